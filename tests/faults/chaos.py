"""A TCP proxy that mistreats what passes: delay, jitter, rate, byte flips, silent cuts, resets, half-open connections.

    actor ─▶ ChaosProxy ─▶ learner         each direction: reader thread ─▶ [queue with due times] ─▶ writer thread

Every random choice comes from the seed, which is printed. `Weather` may change while traffic flows.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass

SEED = int(os.environ.get("FAULTS_SEED", "20261121"))
CHUNK = 16 << 10
AHEAD = 64  # chunks a direction may hold: the link's own buffer


@dataclass
class Weather:
    """What happens to each chunk now."""

    delay_s: float = 0.0  # one way
    jitter_s: float = 0.0  # uniform, on top; order is kept
    rate_bps: float = 0.0  # bits/s per direction; 0: unlimited
    flip: float = 0.0  # probability that one bit of a chunk is flipped
    cut: bool = False  # silence: nothing passes, nothing is closed


class ChaosProxy:
    """Forwards `port` to 127.0.0.1:`target` through `weather`; connections that are open can be reset."""

    def __init__(self, target: int, weather: Weather, seed: int = SEED):
        self.weather, self.flips = weather, 0
        self._target, self._random = target, random.Random(seed)
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._stopping = False
        threading.Thread(target=self._accept, daemon=True).start()

    def reset_all(self) -> None:
        """Tear every connection down with an RST."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                _close(end)

    def garble(self) -> None:
        """Send each actor's end the head of a message of 2^62 bytes, as a flipped bit in a length would."""
        with self._lock:
            for client, _ in self._pairs:
                with contextlib.suppress(OSError):  # that connection has ended
                    client.sendall(b"\x02" + struct.pack(">Q", 1 << 62))

    def half_open(self) -> None:
        """Drop the learner's side of each connection; the actor's side stays open and is never told."""
        with self._lock:
            for _, server in self._pairs:
                with contextlib.suppress(OSError):  # that connection has ended
                    server.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        """Close everything."""
        self._stopping = True
        self._listener.close()
        self.reset_all()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=2)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                with contextlib.suppress(OSError):  # reset meanwhile
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                chunks: queue.Queue[tuple[float, bytes] | None] = queue.Queue(AHEAD)
                threading.Thread(target=self._read, args=(source, chunks), daemon=True).start()
                threading.Thread(target=self._write, args=(chunks, sink, source), daemon=True).start()

    def _read(self, source: socket.socket, chunks: queue.Queue) -> None:
        due = 0.0
        while True:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            if not data:
                chunks.put(None)
                return
            weather = self.weather
            with self._lock:
                jitter = weather.jitter_s * self._random.random()
                if weather.flip and self._random.random() < weather.flip:
                    data = self._flip(data)
            due = max(due, time.monotonic() + weather.delay_s + jitter)
            chunks.put((due, data))

    def _flip(self, data: bytes) -> bytes:
        self.flips += 1
        changed = bytearray(data)
        changed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def _write(self, chunks: queue.Queue, sink: socket.socket, source: socket.socket) -> None:
        free_at = 0.0  # when the line has sent what came before
        while (item := chunks.get()) is not None:
            due, data = item
            if self.weather.rate_bps:
                free_at = max(free_at, due) + len(data) * 8 / self.weather.rate_bps
                due = free_at
            time.sleep(max(0.0, due - time.monotonic()))
            while self.weather.cut and not self._stopping:
                time.sleep(0.02)
            try:
                sink.sendall(data)
            except OSError:
                break
        _close(sink)
        _close(source)
        while item is not None:  # let the reader end
            item = chunks.get()


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        end.close()
