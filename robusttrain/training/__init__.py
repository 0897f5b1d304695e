"""Training: from a batch to the weights after it, epoch by epoch."""
