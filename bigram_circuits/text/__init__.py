"""From text to tokens, and from tokens to n-gram counts; no model involved."""
