"""A model on this machine: loading, placement, memory plans, compilation, recorded forwards, several GPUs."""
