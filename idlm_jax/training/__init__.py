"""Training: mask groups, the two-stream objective, the optimizer step and the loop around it."""
