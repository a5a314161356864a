"""Publish a captioner: for transformers, as ONNX, and as a Space."""
