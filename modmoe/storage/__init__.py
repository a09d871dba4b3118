"""Files: checkpoints, plans and documents are read within bounds, and outputs are written whole or not at all."""
