"""In from and out to other people's formats."""
