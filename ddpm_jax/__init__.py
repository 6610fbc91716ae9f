"""Denoising diffusion probabilistic models (Ho et al. 2020) in JAX: training, sampling, exact resume."""

__version__ = "0.1.0"

__version__ = "0.1.0"
