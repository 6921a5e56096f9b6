"""The gateway's tests share the replay's sample batches and the fault suite's hostile datagrams."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "replay"))
sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
