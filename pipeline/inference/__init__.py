"""Inference: send requests about each sample to a model, and journal every reply."""
