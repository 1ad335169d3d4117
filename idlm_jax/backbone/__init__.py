"""The decoder-only transformer that everything else drives: Qwen3, SDAR, Qwen2 and Llama in one Flax NNX module."""
