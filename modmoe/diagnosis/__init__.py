"""All faults of a checkpoint or an adapter, and how each of them is mended."""
