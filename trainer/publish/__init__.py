"""A captioner as a model of transformers: files with which it loads without this package."""
