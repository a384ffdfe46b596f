"""Text to batches: tokenizer, Parquet to shards, shards to batches."""
