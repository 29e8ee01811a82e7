"""The masking methods, one module each."""
