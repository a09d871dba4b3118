"""What a checkpoint is, known from config.json, the index and the headers of its files, before a weight is read."""
