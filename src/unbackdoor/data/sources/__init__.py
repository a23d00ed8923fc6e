"""Where a defender's images come from: one file for each kind of input."""
