"""Measurements of what a model decodes: that it is exact, and how fast it is."""
