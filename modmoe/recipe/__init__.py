"""Recipes: the settings of a run, from YAML or flags, checked before anything is done."""
