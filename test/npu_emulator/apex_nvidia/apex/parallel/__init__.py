"""Empty in this double."""
