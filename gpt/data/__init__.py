"""Source files, filters, token shards and batches."""
