"""Saved modules, files that are replaced atomically, models of a hub, and a safe reader of pickled files."""
