"""What surrounds a training step: checkpoints, progress, signals."""
