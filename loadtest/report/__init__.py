"""What all reports share: those of load tests, evaluations, analyses and calibrations. Imports nothing else of ours."""
