"""Probabilities that are learned while a run trains: what is measured, believed and drawn by."""
