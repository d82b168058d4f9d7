"""Runs: recipes to weights."""
