"""A shard's parquet: its rows and ids, what made its columns, how it is written and by whom."""
