"""Observers: who watches a rollout (console, video, rerun) without being able to disturb it."""
