"""Rows: reading, checking, shuffling and counting them."""
