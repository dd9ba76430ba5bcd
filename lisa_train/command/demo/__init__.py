"""The main job on a real pretrained model: probe, layers and probabilities, training, report."""
