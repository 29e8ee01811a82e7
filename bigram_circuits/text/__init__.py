"""Text to tokens, and tokens to n-gram counts; no model."""
