"""Attention of a few window rows over a long key/value cache, with a mask inside the window."""
