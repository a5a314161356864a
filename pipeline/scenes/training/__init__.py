"""Training of the tiny models on drawn scenes."""
