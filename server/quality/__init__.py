"""Quality of reduced models: the demo model; calibration and evaluation come later."""
