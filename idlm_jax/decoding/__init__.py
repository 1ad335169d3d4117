"""Decoding: autoregressive and introspective strided decoding (ISD) as one jitted loop (design.md 7)."""
