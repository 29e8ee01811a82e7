"""Models with a known circuit: a bigram in MLPs, and behaviours that use attention."""
