"""Experiments: train captioners on different data or with different settings, and compare them."""
