"""What an engine with a given configuration would choose and need, computed without loading the model."""
