"""The wiring: layers on the road; one file per family of models."""
