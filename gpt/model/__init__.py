"""The networks: architectures, loss, text generation, loading and saving."""
