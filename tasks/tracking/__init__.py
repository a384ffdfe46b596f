"""Everything that imports MLflow: runs, metrics, models and the registry."""
