"""MusicLM (arXiv 2301.11325) in small modules: a sentence becomes music."""

__all__: list[str] = []
