"""Runs as runs: is one healthy, what did it cost, did it help."""
