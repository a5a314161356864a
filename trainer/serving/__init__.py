"""Serve a captioner by OpenAI's chat protocol, or as a demo page."""
