"""Ask a model about each sample, and keep every reply."""
