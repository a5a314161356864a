"""A captioner behind HTTP: OpenAI's chat protocol."""
