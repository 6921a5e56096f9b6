"""Policy heads behind one flow-matching interface (policies.base)."""
