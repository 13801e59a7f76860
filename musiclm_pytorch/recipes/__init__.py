"""Recipes that train and measure the bundled models, and their toy corpus. The library does not import this package."""

__all__: list[str] = []
