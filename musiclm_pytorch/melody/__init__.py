"""Melody conditioning of MusicLM (arXiv:2301.11325, sec. 4.2)."""
