"""What a model is: its layers, tensors and pieces, and sums over them. Reads, never changes."""
