"""Rewrite the attention of pretrained language models so that their KV cache gets small."""
