"""The mathematics of diffusion models: pure functions over arrays, written for one example and scalar t.

Time runs over t = 0..T: t = 0 is data, training draws t from 1..T, and a step goes from t to some s < t.
Batches by `jax.vmap`. Imports numpy, jax and chex and nothing else.
"""
