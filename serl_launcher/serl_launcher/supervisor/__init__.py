"""Starts the roles of a run and keeps them alive; starts both sides for start.sh. Torch-free."""
