"""Reward sources: who says what a step was worth and whether the task is done."""
