"""One run directory: opened, checked, and read as batches and frames."""
