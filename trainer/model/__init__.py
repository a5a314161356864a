"""The captioner: an encoder of images, a connector, and a decoder of text."""
