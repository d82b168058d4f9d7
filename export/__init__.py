"""Cuts a model at a seam and publishes it for TensorFlow Serving."""
