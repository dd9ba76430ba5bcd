"""The words and files that both halves share.

Schema, errors, layer names, probabilities (stdlib only).
"""
