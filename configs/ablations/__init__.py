"""Ablations of the two papers, each a file that defines `ablation`."""
