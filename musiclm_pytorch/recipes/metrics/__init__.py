"""Metrics of generated clips, such as the accuracy of classifiers that are fitted to real clips."""

__all__: list[str] = []
