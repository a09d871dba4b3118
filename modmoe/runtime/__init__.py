"""What a run stands on: its processes, its memory, and the places that it reads and writes."""
