"""The run `plan`: what the training step would need and could do on hardware that is not here."""
