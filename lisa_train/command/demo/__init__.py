"""The main job on a real pretrained model: pilot -> analysis -> probabilities -> LISA -> report."""
