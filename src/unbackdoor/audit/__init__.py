"""What an auditor does with a model that somebody else trained: scan, purify, verify, patch."""
