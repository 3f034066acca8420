"""The trained demo model: synthetic scenes, questions about them, and the checkpoint of a LLaVA trained on both."""
