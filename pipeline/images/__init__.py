"""Images: decoding, similarity, and their fit with texts."""
