"""The OpenAI-style server: an engine in a thread of its own, and HTTP around it."""
