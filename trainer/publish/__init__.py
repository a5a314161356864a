"""Publish a captioner for transformers, as ONNX, or as a Space."""
