"""Metrics of the toy corpora: classifiers of real clips, and what they find in generated ones."""

__all__: list[str] = []
