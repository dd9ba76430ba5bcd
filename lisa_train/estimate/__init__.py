"""Peak memory of a training step, predicted from shapes alone; see `memory.estimate_memory`."""
