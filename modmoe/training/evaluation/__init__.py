"""Measuring a model on text, and with lm-eval."""
