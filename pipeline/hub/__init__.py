"""The Hugging Face Hub: push and pull."""
