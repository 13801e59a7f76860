"""How the bundled models were made and measured: a toy corpus, training runs, metrics. Nothing imports this package."""

__all__: list[str] = []
