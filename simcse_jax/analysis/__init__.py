"""Models side by side: where their sentence vectors lie, how they came there in training, and how they score."""
