"""Everything that touches TransformerLens: loading models, their activations and their maskable weights."""
