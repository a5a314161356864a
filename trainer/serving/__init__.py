"""Serve a captioner over OpenAI's chat protocol or as a demo page."""
