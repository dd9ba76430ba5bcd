"""Writes the run directory: shards, streams and the manifest."""
