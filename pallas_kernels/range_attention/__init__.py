"""Attention of rows that each see an interval of the keys, and of mask groups: the attention of training."""
