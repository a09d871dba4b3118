"""From statistics to a new checkpoint."""
