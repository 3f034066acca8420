"""The demo model that answers: synthetic scenes, questions about them, a LLaVA trained on both, and its checkpoint."""
