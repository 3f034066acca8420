"""Trains the demo model, which `foldserve serve` serves by default: docs/explanation/demo-model.md."""
