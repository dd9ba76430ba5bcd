"""Adapters: which there are, what they started with, and the norms of their products."""
