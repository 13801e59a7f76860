"""Metrics of sets of music clips, one class a file; `musiclm evaluate music` runs them."""

__all__: list[str] = []
