"""Routed adapters, one paper a file. None is here yet."""
