"""Acknowledged delivery: the actor's spool and outbox, the learner's deduplication."""
