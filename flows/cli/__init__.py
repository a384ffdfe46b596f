"""The `overnight` command, one file per group of commands."""
