"""Parts of a training step and of an evaluation."""
