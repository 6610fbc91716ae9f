"""Weights in and out: checkpoints of workdirs, safetensors files, folders of diffusers."""
