"""The training step and its parts: state, optimizer, average, loss."""
