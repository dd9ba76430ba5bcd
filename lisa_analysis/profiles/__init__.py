"""Importance profiles: made from runs, and what can be said of them."""
