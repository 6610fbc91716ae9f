"""The training run: state, optimiser, the step, devices, checkpoints, and the loop that orders them."""
