"""Tests that ask diffusers itself. They are there where PyTorch and diffusers are installed, and nowhere else."""

import importlib.util

collect_ignore_glob = [] if all(map(importlib.util.find_spec, ("torch", "diffusers"))) else ["test_*.py"]
