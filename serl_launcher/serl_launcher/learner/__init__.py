"""The GPU box's entry: supervisor, trainer, parameters and checkpoints."""
