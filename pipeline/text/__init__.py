"""Text: words, keys, languages, personal data, refusals and artifacts."""
