"""Parquet to token shards: rows, text, token ids, shards, manifest."""
