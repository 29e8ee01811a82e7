"""Reading and writing files: atomic writes, one writer at a time, checks on every read."""
