"""Running text through a dense model, whole or a layer at a time."""
