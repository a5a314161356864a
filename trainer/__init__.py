"""From a dataset version to a trained and scored captioner."""
