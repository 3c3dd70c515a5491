"""Scores of sentence vectors."""
