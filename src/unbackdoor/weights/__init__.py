"""Weights in files: reading any container, the card beside them, and reversible patches."""
