"""Peak memory of a training step, predicted from shapes alone; see `estimate.estimate_memory`."""
