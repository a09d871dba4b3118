"""Models as they lie on the disk and in memory: families, FFN layouts, loading, counts."""
