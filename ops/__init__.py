"""Custom TensorFlow ops and their Python wrappers."""
