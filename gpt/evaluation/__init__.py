"""The morning: held-out loss and what the model writes."""
