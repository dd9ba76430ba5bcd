"""Weights on disk, without a run: checkpoints and adapters, streamed from safetensors, no torch."""
