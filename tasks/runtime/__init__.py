"""What a task needs of its process: signals and the Prefect API."""
