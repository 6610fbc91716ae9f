"""The runs that a command starts: train, sample, evaluate, export, plan."""
