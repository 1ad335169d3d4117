"""Losses of next-token distributions that never hold the logits of more than a few rows."""
