"""Training on Ray Train: loop, checkpoints, failures."""
