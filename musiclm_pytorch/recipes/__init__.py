"""Scripts that train and evaluate the bundled models. The library does not import the recipes."""

__all__: list[str] = []
