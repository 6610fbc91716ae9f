"""Tests that ask other programs themselves. They are there where these are installed, and nowhere else."""

import importlib.util


def installed(*names: str) -> bool:
  # A folder of that name, as wandb makes them, is no package.
  specs = [importlib.util.find_spec(name) for name in names]
  return all(spec is not None and spec.origin is not None for spec in specs)


OF_DIFFUSERS = ["test_diffusers.py", "test_autoencoders.py", "test_latent.py"]
collect_ignore_glob = [] if installed("torch", "diffusers") else OF_DIFFUSERS
collect_ignore_glob += [] if installed("torch", "lpips") else ["test_lpips.py"]
collect_ignore_glob += [] if installed("wandb") else ["test_wandb.py"]
collect_ignore_glob += [] if installed("webdataset", "datasets") else ["test_packed.py"]
collect_ignore_glob += [] if installed("uharfbuzz") else ["test_emoji.py"]
