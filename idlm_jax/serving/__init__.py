"""Serving: many requests at once, on pages of one key/value cache."""
