"""How good a model is: held-out loss, benchmarks, comparisons between models."""
