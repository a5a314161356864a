"""Publish a captioner for transformers."""
