"""Tokenising on a Dask or Ray cluster."""
