"""Checkpoints: saved, verified, restored exactly or not at all."""
