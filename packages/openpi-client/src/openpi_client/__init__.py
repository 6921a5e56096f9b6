"""Torch-free policy clients. A robot host needs nothing else to drive a policy that runs elsewhere."""

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker

__all__ = ["ActionChunkBroker", "BasePolicy", "RealtimeChunkBroker"]
