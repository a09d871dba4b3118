"""What is wrong with a checkpoint or an adapter, all of it, and how each fault is mended."""
