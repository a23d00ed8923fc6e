"""A foreign file becomes a classifier: its network recognised, tensors renamed, the rest guessed."""
