"""Drawn scenes with known facts, and tiny models that are trained on them."""
