"""The tied model: what a checkpoint carries beside its weights. Imports torch, transformers and its siblings."""
