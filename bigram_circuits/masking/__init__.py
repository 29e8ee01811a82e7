"""Masks on a live model: applying a mask, gates that are being learned, and the methods that learn them."""
