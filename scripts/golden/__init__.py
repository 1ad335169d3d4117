"""Parts of `make_golden.py`: one module a kind of fixture, all written from PyTorch."""
