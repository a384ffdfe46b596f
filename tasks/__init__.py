"""Prefect tasks: one file a stage, each wrapping functions of gpt."""
