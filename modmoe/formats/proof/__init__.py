"""Comparing an export with the model that it was made from."""
