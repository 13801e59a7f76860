"""Metrics for the toy corpora: classifiers that are fitted to real clips and applied to generated clips."""

__all__: list[str] = []
