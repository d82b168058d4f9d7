"""Recipes: a model, its features and how to train it, as plain data."""
