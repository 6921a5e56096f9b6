"""Environments: one folder or file per robot or simulator, all answering `base.Environment`."""
