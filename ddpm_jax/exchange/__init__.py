"""Weights in and out: the folders of diffusers, files of our own, compiled samplers."""
