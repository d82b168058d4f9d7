"""Metrics, reports and comparisons of trained models."""
