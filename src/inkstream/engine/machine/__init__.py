"""A model on this machine: loading, placement, memory plans, compilation, CUDA graphs, several GPUs."""
