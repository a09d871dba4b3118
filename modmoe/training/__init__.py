"""Training a converted model, and measuring it: one entry on TRL's SFTTrainer, and losses of our own."""
