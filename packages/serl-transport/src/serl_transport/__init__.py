"""Torch-free wire and contract between actors and the learner.

The names of agentlace are here, so that a HIL-SERL script moves by changing its import.
"""

from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.data_store import DataStoreBase, QueuedDataStore
from serl_transport.server import TrainerServer

__all__ = ["DataStoreBase", "QueuedDataStore", "TrainerClient", "TrainerConfig", "TrainerServer"]
