"""FLUX.2: transformers of 4B to 32B over Mistral or Qwen3 text, 128-channel latents at a sixteenth of the side."""
