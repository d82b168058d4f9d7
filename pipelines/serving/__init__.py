"""Servers and clients."""
