"""Publish a captioner for transformers, or as a Space."""
