"""A captioner behind HTTP: OpenAI's chat protocol, and a page to try it on."""
