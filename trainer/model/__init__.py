"""The captioner: an image encoder, a connector, and a text decoder."""
