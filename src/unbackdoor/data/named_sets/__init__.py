"""The named sets: what they must be, where their owners publish them, and how those files are read."""
