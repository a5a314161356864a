"""Image decoding, near-duplicate search, and image-text similarity."""
