"""Training: the loop, one step, optimizers, divergence, checkpoints and many devices."""
