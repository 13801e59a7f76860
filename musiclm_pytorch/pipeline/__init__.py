"""Training of all parts of a model: presets, builders, and a pipeline that continues interrupted runs."""
