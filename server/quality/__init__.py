"""Quality of reduced models: evaluation, calibration, analysis, token maps, the GPU check and the demo model."""
