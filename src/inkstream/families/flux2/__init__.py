"""FLUX.2: transformers of 4B to 32B with Mistral or Qwen3 as text encoder, 128-channel latents at 1/16 of the side."""
