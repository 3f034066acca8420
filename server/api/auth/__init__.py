"""Keys, their rates, and the check of every guarded route."""
