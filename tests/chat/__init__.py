"""A scripted chat server: it speaks vLLM's protocol over a real socket, and fails on demand."""
