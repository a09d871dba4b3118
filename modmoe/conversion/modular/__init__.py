"""ModularMoE: experts that are sets of modules."""
