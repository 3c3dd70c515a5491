"""Training: the loss of a global batch, the step, and the loop around it."""
