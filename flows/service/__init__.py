"""`overnight up`, `overnight doctor` and `overnight watch`."""
