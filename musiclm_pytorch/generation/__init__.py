"""Prompts of MusicLM, and candidates with their scores."""
