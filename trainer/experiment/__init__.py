"""Experiments: the same captioner trained on different data, or differently, and whether that makes a difference."""
