"""Containers of weights, one file each; they read bytes and never execute any. See docs/auditing.md."""
