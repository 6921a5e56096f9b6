"""Operators: who else, beside the policy, may drive the robot."""
