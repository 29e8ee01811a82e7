"""Files: written whole or not at all, one writer at a time, checked when they are read."""
