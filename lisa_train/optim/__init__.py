"""What is done to an optimizer in any loop.

State of frozen tensors, steps inside backward, 8-bit groups, warm-up.
"""
