"""Trains the demo model that `foldserve serve` serves where no model is named: docs/explanation/demo-model.md."""
