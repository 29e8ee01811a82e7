"""The only door to TransformerLens: loading models, their activations, their maskable weights."""
