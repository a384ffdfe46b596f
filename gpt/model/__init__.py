"""The network: transformer, loss, generation."""
