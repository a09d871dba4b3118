"""Pruning and merging the experts of a mixture of experts."""
