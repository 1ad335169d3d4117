"""Serving: many requests at once on pages of one key/value cache, and the OpenAI-style server around it."""
