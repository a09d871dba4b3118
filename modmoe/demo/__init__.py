"""The small real model that ships with modmoe, the text it was trained on, and how it was made."""
