"""What both sides agree on: the task spec, time steps and episodes, typed errors."""
