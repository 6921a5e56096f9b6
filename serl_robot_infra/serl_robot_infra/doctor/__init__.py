"""Is this host as FlowSERL needs it, and what mends it? tools/doctor.py asks; a GPU box and a robot host alike.

`check/` asks whether one robot is ready for a session; here nothing of a robot is opened. Torch-free: what needs torch
is asked of a process of its own, and skipped, which is said, where the learner's packages are not installed.
"""
