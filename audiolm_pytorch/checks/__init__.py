"""Checks of the arguments of public functions and constructors."""
