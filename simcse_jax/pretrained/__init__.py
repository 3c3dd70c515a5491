"""Pretrained checkpoints: folders, tokenizers, weights and pooling, of Hugging Face, sentence-transformers and ours."""
