"""Exported models: the model card, and the sampler as a compiled program."""
