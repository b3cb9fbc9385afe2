"""FLUX.1: a 12B transformer with T5 and CLIP as text encoders and 16-channel latents at 1/8 of the picture's side."""
