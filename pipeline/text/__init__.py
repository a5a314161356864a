"""Text: words, content keys, personal data."""
