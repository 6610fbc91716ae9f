"""How fast it is: training, drawing, reading, the whole loop, and PyTorch beside it. See README.md in this folder."""
