"""The gateway role: every socket of a run, the journal, the ring, the schedule. Torch-free."""
