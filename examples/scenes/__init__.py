"""Train the tiny models on drawn scenes (`make teacher`)."""
