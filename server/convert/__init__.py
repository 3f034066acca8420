"""Other people's checkpoints into the layout that we serve."""
