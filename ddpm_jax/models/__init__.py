"""Flax modules. They know arrays, not the run's configuration; `build` alone turns a ModelConfig into a module."""
