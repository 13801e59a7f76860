"""Model folders and the parts that ship with the package."""
