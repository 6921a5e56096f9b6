"""Files of the first host's run folder, for the ranks of another one: checkpoints and published versions, on demand.

    rank 0: "go back to checkpoints/step_000900" ─▶ FirstHost.checkpoint ── file {name, offset} ─▶ gateway.feed
                                                          └▶ checkpoints/ of this host, compared with its manifest

Nothing is fetched that is here and whole. Ranks of one host take turns by a lock: the first one fetches. Torch-free.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from serl_launcher.run import checkpoints
from serl_launcher.run.alive import beat, busy
from serl_launcher.run.config import task_spec
from serl_launcher.run.files import DamagedFileError, sha256_of, write_whole
from serl_launcher.run.paths import RunPaths
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig

log = logging.getLogger("trainer")
PART_BYTES = 4 << 20
ANSWER_MS = 60_000.0


def host_name(number: int) -> str:
    """By which the gateway, and with keys its allow-list, knows a host: `host-1` of launch.machine_rank=1."""
    return f"host-{number}"


def follower_client(cfg: DictConfig, on_wait=None) -> TrainerClient:
    """A connection to the first host's gateway, which is waited for.

    WireError: it refuses this host; ValueError: no such key, or no address.
    """
    if not OmegaConf.select(cfg, "launch.main_host"):
        raise ValueError("launch.main_host: expected the name or address of the first machine, got none")
    wire = TrainerConfig(cfg.port, cfg.broadcast_port, keys_dir=OmegaConf.select(cfg, "security.keys_dir"))
    return TrainerClient(
        host_name(cfg.launch.machine_rank), str(cfg.launch.main_host), wire,
        spec=task_spec(cfg), role="follower", run=cfg.run, on_wait=on_wait,
    )  # fmt: skip


class FirstHost:
    """cfg: of the run on this host; paths: this host's run folder."""

    def __init__(self, cfg: DictConfig, paths: RunPaths) -> None:
        self._cfg, self._paths = cfg, paths

    @busy(7200.0, "fetching a checkpoint")
    def resume_from(self, name: str | None) -> None:
        """Leave one checkpoint here, the one that rank 0 resumed from, fetched where it is not whole; None: none."""
        with self._turn():
            for folder in checkpoints.folders(self._paths.checkpoints):
                if folder.name != name:
                    shutil.rmtree(folder)
            if name is not None:
                self._checkpoint(name)

    @busy(7200.0, "fetching a checkpoint")
    def checkpoint(self, there: str | Path) -> Path:
        """The copy of a checkpoint folder of the first host."""
        with self._turn():
            return self._checkpoint(Path(there).name)

    @busy(7200.0, "fetching a version")
    def version(self, there: str | Path) -> Path:
        """The copy of a file of params/ of the first host, compared with what was published of it."""
        name = Path(there).name
        here = self._paths.params / name
        with self._turn(), self._client() as client:
            told = json.loads(self._bytes(client, f"params/{Path(name).stem}.json"))
            if not here.is_file() or sha256_of(here) != told["sha256"]:
                self._fetch(client, f"params/{name}", here)
                _compare(here, told["sha256"])
        return here

    def _checkpoint(self, name: str) -> Path:
        folder = self._paths.checkpoints / name
        with self._client() as client:
            manifest = self._bytes(client, f"checkpoints/{name}/{checkpoints.MANIFEST}")
            mine = folder / checkpoints.MANIFEST
            if mine.is_file() and mine.read_bytes() == manifest and checkpoints.problem(folder) is None:
                return folder
            log.info("fetching %s from the first host", name)
            part = folder.with_name(f"{name}.fetched")
            shutil.rmtree(part, ignore_errors=True)
            for file in checkpoints.FILES:
                self._fetch(client, f"checkpoints/{name}/{file}", part / file)
            (part / checkpoints.MANIFEST).write_bytes(manifest)
        if wrong := checkpoints.problem(part):
            raise DamagedFileError(f"the first host's checkpoint came damaged: {wrong}")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return folder

    def _bytes(self, client: TrainerClient, name: str) -> bytes:
        return b"".join(self._parts(client, name))

    def _fetch(self, client: TrainerClient, name: str, path: Path) -> None:
        def write(part: Path) -> None:
            with part.open("wb") as file:
                for block in self._parts(client, name):
                    file.write(block)
                    beat()

        write_whole(path, write)

    def _parts(self, client: TrainerClient, name: str) -> Iterator[bytes]:
        at, size = 0, 1
        while at < size:
            reply = client.request("file", {"name": name, "offset": at, "most": PART_BYTES}, timeout_ms=ANSWER_MS)
            size, data = reply["size"], bytes(reply["data"])
            if not data and at < size:
                raise DamagedFileError(f"{name} of the first host ends at byte {at} of {size}")
            at += len(data)
            yield data

    @contextmanager
    def _client(self) -> Iterator[TrainerClient]:
        client = follower_client(self._cfg)
        try:
            yield client
        finally:
            client.stop()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._paths.root.mkdir(parents=True, exist_ok=True)
        with (self._paths.root / "fetch.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _compare(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        path.unlink()
        raise DamagedFileError(f"{path.name} of the first host came damaged: it does not match its sha256")
