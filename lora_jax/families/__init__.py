"""The model families, one file each: a config, a weight table, and what one layer does."""
