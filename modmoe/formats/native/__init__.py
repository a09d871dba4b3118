"""Mixtures of experts in the formats of other architectures."""
