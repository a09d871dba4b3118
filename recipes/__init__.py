"""Recipes that ship with modmoe, installed as ``modmoe.recipes``; see ``modmoe recipes ls``."""

if __name__ != "modmoe.recipes":
    raise ImportError(f"this package is modmoe.recipes; it cannot be imported as '{__name__}'.")
