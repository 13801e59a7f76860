"""Training of all modules of a MusicLM: presets, builders, and a pipeline that continues interrupted runs."""
