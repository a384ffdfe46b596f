"""Tokenizing on a Dask or Ray cluster."""
