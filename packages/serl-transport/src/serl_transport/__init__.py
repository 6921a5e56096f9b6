"""Torch-free wire and contract between actors and the learner."""
