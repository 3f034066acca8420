"""Converts other people's checkpoints to the layout that foldserve serves."""
