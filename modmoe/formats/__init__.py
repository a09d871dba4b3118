"""What a written checkpoint looks like, and the proof that it is right."""
