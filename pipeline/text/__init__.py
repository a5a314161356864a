"""Text: words, content keys, spelling, personal data."""
