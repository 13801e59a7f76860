"""Training of all stages: presets, builders, and the run that continues where it was interrupted."""
