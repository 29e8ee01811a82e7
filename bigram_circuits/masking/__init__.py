"""Masks on a live model: gates that are being learned, the methods that learn them, and applying a mask."""
