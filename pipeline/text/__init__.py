"""Analyze text: words, keys for comparison, languages, personal data, refusals and artifacts."""
