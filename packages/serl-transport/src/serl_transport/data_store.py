"""Where agentlace-style scripts put data: the actor inserts, the client sends what is new, the server inserts again."""

import threading
from abc import ABC, abstractmethod
from collections import deque
from typing import Any


class DataStoreBase(ABC):
    """An append-only store whose items have growing ids. Implement it over a replay buffer for the learner's side."""

    def __init__(self, capacity: int):
        self.capacity = capacity

    @abstractmethod
    def insert(self, data: Any) -> None:
        """Add one item."""

    @abstractmethod
    def latest_data_id(self) -> int:
        """Id of the newest item, −1 when nothing was ever inserted."""

    @abstractmethod
    def get_latest_data(self, from_id: int) -> list[Any]:
        """The items after `from_id`, oldest first, as far as they are still held."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of items held."""

    def batch_insert(self, batch_data: list[Any]) -> None:
        """Add items in order."""
        for data in batch_data:
            self.insert(data)

    def since(self, from_id: int) -> tuple[list[Any], int]:
        """The items after `from_id` and the id of the last of them; override where inserts are concurrent."""
        return self.get_latest_data(from_id), self.latest_data_id()


class QueuedDataStore(DataStoreBase):
    """The newest `capacity` items in memory; thread-safe."""

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._items: deque[Any] = deque(maxlen=capacity)
        self._latest_id = -1
        self._lock = threading.Lock()

    def insert(self, data: Any) -> None:
        with self._lock:
            self._items.append(data)
            self._latest_id += 1

    def latest_data_id(self) -> int:
        return self._latest_id

    def get_latest_data(self, from_id: int) -> list[Any]:
        return self.since(from_id)[0]

    def since(self, from_id: int) -> tuple[list[Any], int]:
        with self._lock:
            new = min(self._latest_id - from_id, len(self._items))
            return list(self._items)[len(self._items) - new :] if new > 0 else [], self._latest_id

    def __len__(self) -> int:
        return len(self._items)
