"""Saving and loading: modules, files replaced atomically, models from the Hugging Face hub, safely read pickles."""
