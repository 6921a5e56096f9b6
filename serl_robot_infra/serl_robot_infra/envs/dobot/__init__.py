"""Dobot arms over the vendor's TCP protocol: `task=dobot_pnp` (X-Trainer), `task=dobot_pnp_tool` (end-effector)."""
