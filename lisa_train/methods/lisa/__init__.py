"""LISA: the engine that samples layers, its settings, checks, schedule and samplers."""
