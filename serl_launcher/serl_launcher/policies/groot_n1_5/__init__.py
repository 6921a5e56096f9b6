"""GR00T N1.5: Eagle 2.5 backbone, diffusion transformer with future tokens, 16 ticks a chunk."""
