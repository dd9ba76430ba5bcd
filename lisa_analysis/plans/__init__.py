"""A profile turned into what the next run does."""
