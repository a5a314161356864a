"""Training of the tiny models that know drawn scenes: `make teacher`."""
