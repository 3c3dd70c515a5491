"""Models side by side: the geometry of their sentence vectors, its path in training, and their scores."""
