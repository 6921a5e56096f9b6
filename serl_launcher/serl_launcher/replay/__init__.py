"""Torch-free replay: journal (source of truth), assembler (step batches to episodes), ring (shared memory)."""
