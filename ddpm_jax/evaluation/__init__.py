"""Measuring a trained model: likelihoods, distances between samples and data, memorisation."""
