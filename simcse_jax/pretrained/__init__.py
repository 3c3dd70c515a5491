"""Pretrained checkpoints (Hugging Face, sentence-transformers, ours): folders, tokenizers, weights and pooling."""
