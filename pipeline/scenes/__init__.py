"""The embedded world: drawn scenes with known facts, and the tiny models that know them."""
