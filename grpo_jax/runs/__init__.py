"""A run on the host: set-up, the loop, the reference, measuring, evaluating, memory, checkpoints, the run directory."""
