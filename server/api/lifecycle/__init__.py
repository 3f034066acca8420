"""How the server begins and ends: readiness, drain, and the death of the engine."""
