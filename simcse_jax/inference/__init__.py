"""Trained models in use: loading, encoding, similarity, search and export."""
