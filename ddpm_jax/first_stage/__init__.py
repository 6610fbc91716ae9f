"""First stages: between images, uint8, and x_0, what the diffusion sees."""
