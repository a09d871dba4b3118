"""The tied model: what a standalone checkpoint carries beside its weights. Imports torch, transformers and its siblings."""
