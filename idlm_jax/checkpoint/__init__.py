"""Checkpoints in and out: Hugging Face directories, GGUF files, PEFT adapters and our own Orbax directories."""
