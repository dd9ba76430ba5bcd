"""What was measured per step and layer, and each question that can be put to it."""
