"""What a model is: its layers, tensors and shards, and sums over them. Reads, never changes."""
