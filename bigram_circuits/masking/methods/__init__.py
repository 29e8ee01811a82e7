"""The masking methods, one module for each."""
