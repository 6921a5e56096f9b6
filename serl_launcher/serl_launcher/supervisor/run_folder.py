"""Make runs/<name>/ ready for a learner, or say in one message why it cannot be. Called by the learner's main.

Decides whether the folder is new, resumed, finished or another experiment's; takes its lock; writes config.yaml. What
the roles would trip over later (ports, disk, a missing checkpoint) is found here, before anything is started.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from openpi_client.groot_layout import Layout
from serl_config.secrets import literal_secrets, secret
from serl_launcher.datasets.source import read_sources
from serl_launcher.replay.journal import JournalCorrupt, JournalReader
from serl_launcher.run import config as run_config
from serl_launcher.run.config import plain, task_spec
from serl_launcher.run.console import lay_out
from serl_launcher.run.files import DamagedFileError, clear, make_folder, read_sealed, write_text
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import Stage, read_stages
from serl_launcher.run.versions import PublishedVersion
from serl_launcher.supervisor import launch
from serl_launcher.supervisor.given import name_version, passed_over
from serl_transport.contract.bounds import check_name
from serl_transport.security.auth import is_loopback

MIN_FREE_MB = 500
# A killed learner's gateway may need a moment to let go of its ports.
PORT_PATIENCE_S = 5.0
# What makes the recorded data and the parameters of a run usable; the rest may change from one start to the next.
IDENTITY = ("task.name", "task.spec", "policy")
NOTED = ("task.env", "code")  # a serial number, an address, a lab's package: worth a line, and the user's to judge
# What a start leaves that never got data, made for its task and policy.
UNUSED = ("journal", "params", "checkpoints", "dataset", "metrics", "stage_progress.json")


class RunError(ValueError):
    """The run cannot start; the message is complete and meant for the user."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that is ours."""

    paths: RunPaths  # absolute
    stages: tuple[Stage, ...]
    state: str  # "new", "resumed" or "complete"
    lock: IO[str]  # held until closed or until this process is gone
    console: str | None = None  # the address of the run's page


def run_paths(cfg: DictConfig) -> RunPaths:
    """Paths of the run that `cfg` names, absolute. RunError: the name is no folder name."""
    try:
        check_name(f"run names a folder in {cfg.runs_dir}/", cfg.run)
    except ValueError as error:
        raise RunError(str(error)) from None
    return RunPaths(Path(cfg.runs_dir).resolve() / cfg.run)


def prepare(cfg: DictConfig) -> RunFolder:
    """Check everything, take the lock and write config.yaml. RunError tells the user what to change."""
    paths = run_paths(cfg)
    try:
        stages = read_stages(OmegaConf.to_container(cfg.schedule.stages))
    except ValueError as error:
        raise RunError(str(error)) from None
    try:
        task_spec(cfg)
    except ValueError as error:
        raise RunError(f"config/task/{cfg.task.get('name')}.yaml: {error}") from None
    check_network(cfg)
    check_launch(cfg)
    if cfg.checkpoint_path and not Path(cfg.checkpoint_path).exists():
        raise RunError(
            f"checkpoint_path={cfg.checkpoint_path}: no such file or folder ({Path.cwd()} is the work folder)"
        )
    name_version(cfg)
    try:
        read_sources(plain(cfg, "demos"))
    except ValueError as error:
        raise RunError(str(error)) from None
    _check_reward(cfg)
    _check_clients(cfg)
    lock = _open_folder(paths)
    if is_complete(paths, cfg) and cfg.on_complete == "rotate":
        print(f"the finished run {paths.root.name} was moved to {rotate(paths)}", flush=True)
        lock.close()
        lock = _open_folder(paths)
    state = _state(paths, cfg)
    if state != "complete":
        if not launch.is_follower(cfg):
            wait_for_ports(cfg)
        _archive_summary(paths)
        paths.status.unlink(missing_ok=True)  # the last start's "done" is not ours
        _write_config(paths, cfg)
    shown = state != "complete" and not launch.is_follower(cfg)
    return RunFolder(paths, stages, state, lock, _console(paths, cfg) if shown else None)


def _console(paths: RunPaths, cfg: DictConfig) -> str | None:
    try:
        place = lay_out(cfg, paths)
    except ValueError as mistake:
        raise RunError(str(mistake)) from None
    except OSError as error:
        raise RunError(f"cannot write console.json into {paths.root}: {error.strerror}") from None
    return place.url if place else None


def _write_config(paths: RunPaths, cfg: DictConfig) -> None:
    """config.yaml; one that holds a secret itself is for its owner alone, and the screen says what to do better."""
    exposed = list(literal_secrets(OmegaConf.to_container(cfg, resolve=True)))
    for key in exposed:
        print(
            f"warning: {key} is given as it is: whoever may list this machine's processes can read it, and so can "
            f"whoever reads the config of a copy of {paths.root}; give {key}=env:NAME or {key}=file:PATH",
            flush=True,
        )
    write_text(paths.config, OmegaConf.to_yaml(cfg, resolve=True), durable=True, mode=0o600 if exposed else 0o666)


def is_complete(paths: RunPaths, cfg: DictConfig) -> bool:
    """Did a run with this very schedule finish here? A damaged summary is made again: the stages are not.

    A schedule without stages never finishes: its summary is of the evaluations so far.
    """
    if not cfg.schedule.stages:
        return False
    try:
        if read_sealed(paths.summary) is None or not os.path.lexists(paths.config):
            return False
    except DamagedFileError as damage:
        print(f"{damage}; it is moved aside, and written again when every stage is done", flush=True)
        paths.summary.rename(paths.summary.with_name(f"{paths.summary.name}.damaged-{time.time_ns()}"))
        return False
    return plain(read_config(paths), "schedule") == plain(cfg, "schedule")


def rotate(paths: RunPaths) -> Path:
    """Move a finished run's folder aside; returns its new place."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(paths.summary.stat().st_mtime))
    return paths.root.rename(_unused(paths.root.with_name(f"{paths.root.name}.{stamp}")))


def _unused(path: Path) -> Path:
    """`path`, or one beside it: a clock that was set back gives the same time twice."""
    if not path.exists():
        return path
    return next(p for k in count(2) if not (p := path.with_name(f"{path.stem}-{k}{path.suffix}")).exists())


def read_config(paths: RunPaths) -> DictConfig:
    """The config of the folder's last start. RunError: it cannot be read."""
    try:
        return run_config.read_config(paths.config)
    except (ValueError, OSError) as error:
        raise RunError(
            f"{error}; take run=<new name>. Where this start's words are the run's own you may remove the file instead"
        ) from None


def wait_for_ports(cfg: DictConfig) -> None:
    """Every port can be bound. RunError names the one in use, after a few seconds of patience."""
    deadline = time.monotonic() + PORT_PATIENCE_S
    for key in ("port", "broadcast_port", "reward.port"):
        port = OmegaConf.select(cfg, key) or 0
        while problem := _bind_problem(cfg.bind_host, port):
            if time.monotonic() > deadline or "in use" not in problem:
                raise RunError(
                    f"{key}={port} on {cfg.bind_host}: {problem}; is another learner running? "
                    f"Stop it, or give both sides another {key}="
                )
            time.sleep(0.2)


def _bind_problem(host: str, port: int) -> str:
    if port == 0:
        return ""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def check_network(cfg: DictConfig) -> None:
    """Ports and address make sense and are allowed. RunError tells what to change."""
    for key in ("port", "broadcast_port"):
        if not isinstance(cfg[key], int) or not 0 <= cfg[key] <= 65535:
            raise RunError(f"{key}={cfg[key]}: expected a port from 1 to 65535 (0: any free one)")
    if cfg.port == cfg.broadcast_port != 0:
        raise RunError(f"port and broadcast_port are both {cfg.port}; they must differ")
    if launch.is_follower(cfg) or is_loopback(cfg.bind_host) or OmegaConf.select(cfg, "security.keys_dir"):
        return
    if not cfg.insecure:
        raise RunError(
            f"bind_host={cfg.bind_host} lets anyone on that network drive the policy and send data; make keys "
            "(tools/keygen.py) and give security.keys_dir, or add insecure=true if that network is yours alone, "
            "or keep 127.0.0.1 and use an ssh tunnel"
        )


def check_launch(cfg: DictConfig) -> None:
    """The trainer's processes can be started as `launch` says. RunError tells what to set."""
    try:
        launch.check_launch(cfg)
    except ValueError as error:
        raise RunError(str(error)) from None


def _check_reward(cfg: DictConfig) -> None:
    """A learned reward has a model to serve: without one every actor would wait for its server for ever."""
    reward = None if OmegaConf.select(cfg, "task.reward") else cfg.get("reward")
    if reward and "model" in reward and not reward.model:
        raise RunError(
            "reward=classifier: expected reward.model=<folder that train_reward.sh wrote>, got none; "
            "name it, or take another reward="
        )


def _check_clients(cfg: DictConfig) -> None:
    """What the servers of openpi's and GR00T's clients need leads somewhere; they would start for ever for it."""
    given = [name for name in ("openpi", "groot") if OmegaConf.select(cfg, f"serving.{name}_port") is not None]
    try:
        for name in given:
            secret(OmegaConf.select(cfg, f"serving.{name}_token"), f"serving.{name}_token")
        if "groot" in given:
            Layout.read(OmegaConf.select(cfg, "serving.groot_modality"), task_spec(cfg), "serving.groot_modality")
    except ValueError as error:
        raise RunError(str(error)) from None


def _open_folder(paths: RunPaths) -> IO[str]:
    """Create the folder, check that it takes data and lock it."""
    try:
        make_folder(paths.logs, durable=True)
        for path in _plain_files(paths):
            clear(path)
        lock = (paths.root / ".lock").open("a")
    except OSError as error:
        raise RunError(f"cannot write into {paths.root}: {error.strerror}; choose another runs_dir=") from None
    free_mb = shutil.disk_usage(paths.root).free >> 20
    if free_mb < MIN_FREE_MB:
        raise RunError(
            f"only {free_mb} MB are free for {paths.root}, a run needs {MIN_FREE_MB}; choose another runs_dir="
        )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"another learner works in {paths.root}; stop it or choose another run=") from None
    return lock


def _plain_files(paths: RunPaths) -> list[Path]:
    """What is opened where it lies and holds nothing that a run cannot do without: locks, logs, what is derived."""
    locks = [paths.root / ".lock", paths.root / "dataset.lock", paths.journal / "lock"]
    derived = [paths.status, paths.acceptance, paths.metrics / "trainer.jsonl"]
    logs = [path for pattern in ("*.log", "*.starting", "*.exit") for path in paths.logs.glob(pattern)]
    return [*locks, *derived, *logs]


def _state(paths: RunPaths, cfg: DictConfig) -> str:
    if not os.path.lexists(paths.config) and not paths.journal.exists():
        return "new"
    used = holds_data(paths)
    if used and cfg.resume == "never":
        raise RunError(f"{paths.root} holds a run and resume=never; choose another run=, or resume=auto to continue it")
    if os.path.lexists(paths.config):
        old = read_config(paths) if used else _readable(paths)
        if not cfg.checkpoint_path and (known := plain(old, "policy.trained_on")) is not None:
            with open_dict(cfg):  # checkpoint_path is for the start that began the run
                cfg.policy.trained_on = known
        if changed := [*differences(old, cfg, IDENTITY)]:
            if used:
                raise RunError(
                    f"{paths.root} holds another experiment:{_rows(changed)}\nStart a new one with run=<new name>, or "
                    f"set these keys back. (A key that only an update added: write it into {paths.config}.)"
                )
            _put_aside(paths)
            return "new"
        if other := passed_over(paths, old, cfg):
            if used:
                raise RunError(other)
            _put_aside(paths)
            return "new"
        if changed := [*differences(old, cfg, NOTED)]:
            print(f"{paths.root} was recorded with another task.env or code:{_rows(changed)}", flush=True)
    return "complete" if is_complete(paths, cfg) else "resumed"


def _readable(paths: RunPaths) -> DictConfig:
    """The config of a start that came to nothing; empty when that was torn."""
    try:
        return read_config(paths)
    except RunError:
        return OmegaConf.create({})


def holds_data(paths: RunPaths) -> bool:
    """Was anything recorded or trained here? A journal's first record is the task's spec, no data yet."""
    if paths.episodes.exists() and paths.episodes.stat().st_size:
        return True  # perhaps all that is left: then the gateway tells that the journal is gone
    published = PublishedVersion.read(paths.params)
    if paths.summary.exists() or (published is not None and published.step > 0):
        return True
    reader = JournalReader(paths.journal)
    try:
        return len(list(islice(reader.poll(), 2))) > 1
    except JournalCorrupt:  # the gateway tells what is wrong with it
        return True
    finally:
        reader.close()


def _put_aside(paths: RunPaths) -> None:
    """Out of the way of another task or policy. The spool and a pressed e-stop stay where an actor looks for them."""
    found = [name for name in UNUSED if (paths.root / name).exists()]
    if not found:
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = _unused(paths.root / f"unused.{stamp}")
    aside.mkdir()
    for name in found:
        (paths.root / name).rename(aside / name)
    print(f"nothing was recorded here with the task or policy of before; what it left is in {aside}", flush=True)


def differences(old: DictConfig, new: DictConfig, keys: Sequence[str]) -> Iterator[tuple[str, Any, Any]]:
    """What differs under these keys, as (dotted key, old, new)."""
    for key in keys:
        yield from _differences(key, plain(old, key), plain(new, key))


def _rows(changed: Sequence[tuple[str, Any, Any]]) -> str:
    rows = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in changed[:8])
    return rows + (f"\n  and {len(changed) - 8} more" if len(changed) > 8 else "")


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new


def _archive_summary(paths: RunPaths) -> None:
    """A summary of an earlier schedule (data collection before training) keeps its figures under its own time."""
    if paths.summary.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(paths.summary.stat().st_mtime))
        kept = paths.summary.rename(_unused(paths.root / f"summary.{stamp}.json"))
        print(f"another schedule finished here before; its figures are kept in {kept}", flush=True)
