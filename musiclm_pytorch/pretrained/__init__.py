"""Model folders, and the trained parts that the package contains."""
