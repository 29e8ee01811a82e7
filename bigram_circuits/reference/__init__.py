"""The embedded reference model: its weights, the reader of its corpus, and the script that trained it."""
