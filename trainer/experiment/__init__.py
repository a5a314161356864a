"""Experiments: train one captioner on different data or with different settings, and compare the results."""
