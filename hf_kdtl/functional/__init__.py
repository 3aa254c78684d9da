"""Pure functions on tensors: one value per image, never reduced over the batch. Imports torch and nothing else."""
