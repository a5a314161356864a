"""A small server for the Hugging Face Hub's protocol on loopback, for tests and for `make demo`."""
