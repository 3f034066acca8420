"""Who asks and how much of it: keys, their rates, and the check that every guarded route makes."""
