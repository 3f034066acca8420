"""Trains the demo model that `foldserve serve` serves where no model is named: docs/demo-model.md."""
