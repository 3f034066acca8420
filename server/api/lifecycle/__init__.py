"""How the server starts and ends: readiness, drain, and the death of the engine."""
