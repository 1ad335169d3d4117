"""Benchmarks whose files lie here: questions, answers by every way to decode, scores, and a summary of them all."""
