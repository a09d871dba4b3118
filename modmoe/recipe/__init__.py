"""Recipes: what a run is told, from YAML or flags, checked before anything is done."""
