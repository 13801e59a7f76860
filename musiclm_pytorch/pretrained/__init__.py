"""Functions for model folders, and for the trained models that are bundled with the package."""
