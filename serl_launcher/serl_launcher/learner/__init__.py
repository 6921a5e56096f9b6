"""The trainer role: the train loop and its collaborators (checkpoints, resuming, faults, limits)."""
