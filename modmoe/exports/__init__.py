"""Giving a converted model away: tied with its code, as another architecture's MoE, or as one dense model an expert."""
