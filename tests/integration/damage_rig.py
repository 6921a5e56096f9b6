"""A tiny run folder with every kind of file, ways to damage one, and each role opened on it in this process.

make_run ─▶ folder ─▶ copy, damage one file ─▶ opened ─▶ what each role found, or the one line with which it ends
"""

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import check_run
import numpy as np
from omegaconf import DictConfig, OmegaConf
from tiny import SPEC, tiny_config

from serl_launcher.exporter.quarantine import Quarantine
from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.gateway.__main__ import MISTAKES
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.replay.journal import JournalCorrupt
from serl_launcher.replay.relabelled import Relabelled
from serl_launcher.rewards import model as rewards
from serl_launcher.run.config import read_config
from serl_launcher.run.files import write_sealed
from serl_launcher.run.internal import InternalClient
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.supervisor.run_folder import RunError, prepare
from serl_robot_infra.estop import EmergencyStop
from serl_transport.client import TrainerClient
from serl_transport.config import TrainerConfig
from serl_transport.contract.errors import SpoolError
from serl_transport.contract.schema import EpisodeInfo, Outcome, StepBatch
from serl_transport.delivery.outbox import Ledger
from serl_transport.delivery.spool import DiskSpool
from serl_transport.wire import codec

STAGES = [
    {"name": "demos", "mode": "demo", "episodes": 2},
    {"name": "sft", "mode": "train", "steps": 4},
    {"name": "after", "mode": "eval", "episodes": 2},
]


def run_config(runs_dir: Path, more_steps: int = 0, **changes: Any) -> DictConfig:
    """The config of the run `t`; more_steps: of one more stage, with which it is resumed."""
    cfg = tiny_config(
        run="t", runs_dir=str(runs_dir), port=0, broadcast_port=0, replay__capacity_frames=200, trainer__batch_size=4,
        trainer__device="cpu", serving__device="cpu", trainer__log_period=1, trainer__publish_period=2,
        trainer__checkpoint_period=2, telemetry__tensorboard=False, exporter__video=False, gateway__dead_actor_s=0.5,
        serving__flow_steps=2, **changes,
    )  # fmt: skip
    cfg.task.rate_hz = SPEC.control_hz
    more = [{"name": "more", "mode": "train", "steps": more_steps}] if more_steps else []
    cfg.schedule = {"stages": [*STAGES, *more]}
    return cfg


def episode(name: str, mode: str, stage: str, boot: str, seed: int, n: int = 6) -> StepBatch:
    """A whole successful episode of the tiny task, in one batch."""
    rng = np.random.default_rng(seed % 1000)
    last = np.arange(n) == n - 1
    arrays = {
        **{f"observation.images.{c}": rng.integers(0, 256, (n + 1, 32, 32, 3), np.uint8) for c in SPEC.cameras},
        "observation.state": rng.uniform(0, 1, (n + 1, 3)).astype(np.float32),
        "action": rng.uniform(-0.02, 0.02, (n, 2)).astype(np.float32),
        "next.reward": last.astype(np.float32),
        "next.done": last,
        "next.truncated": np.zeros(n, bool),
        "next.success": last,
        "intervention": np.zeros(n, bool),
        "policy_version": np.full(n, 1, np.int64),
        "time_ns": np.arange(n, dtype=np.int64),
    }
    who = EpisodeInfo(name, "robot", boot, SPEC.name, SPEC.prompt, mode, stage, seed, 1000.0)
    return StepBatch(who, 0, arrays, True, Outcome(True, "environment", None))


@contextmanager
def serving(cfg: DictConfig, root: Path) -> Iterator[Gateway]:
    """The run's gateway, serving in a thread."""
    gateway = Gateway(GatewaySettings.of(OmegaConf.to_container(cfg, resolve=True)), RunPaths(root))
    thread = threading.Thread(target=gateway.run)
    thread.start()
    try:
        yield gateway
    finally:
        gateway.stop()
        thread.join(20)


@contextmanager
def actor(gateway: Gateway, root: Path) -> Iterator[TrainerClient]:
    """A client with a spool and a ledger in the run folder."""
    ports, spool = TrainerConfig(port_number=gateway.port, broadcast_port=gateway.broadcast_port), root / "spool"
    client = TrainerClient("robot", "127.0.0.1", ports, spec=SPEC, spool_dir=spool / "robot",
                           ledger_path=spool / "robot.acknowledged.jsonl", wait_for_server=False)  # fmt: skip
    try:
        yield client
    finally:
        client.stop()


def make_run(runs_dir: Path) -> Path:
    """A run whose stages are done: real gateway, trainer, exporter and actor's client; nothing in it is made up."""
    cfg = run_config(runs_dir)
    folder = prepare(cfg)
    folder.lock.close()
    root = folder.paths.root
    labels = Relabelled(root)
    labels.add({"demos-1": False}, "alice", "2026-01-01T00:00:00")
    labels.save()
    older = {"demos-0": {"success": True, "by": "alice", "time": "2026-01-01T00:00:00"}}
    write_sealed(folder.paths.relabelled, older, indent=1)  # as a release before the ledger of acts wrote it
    with serving(cfg, root) as gateway, actor(gateway, root) as client:
        first_eval = 2**31
        for k, (mode, stage) in enumerate([("demo", "demos"), ("demo", "demos"), ("eval", "after"), ("eval", "after")]):
            seed = gateway.settings.stages[2].first_seed + k - 2 if mode == "eval" else first_eval // 4 + k
            client.send_item(episode(f"{stage}-{k}", mode, stage, client.boot_id, seed).to_body())
        assert client.flush(20)
        with closing(InternalClient(root, "trainer")) as link:
            build_trainer(cfg, folder.paths, link).run()
        gateway.operator.keep({"act": "pause"}, by="alice")
    with closing(Exporter(root, SPEC, ExporterOptions(), video=False)) as exporter:
        exporter.poll(flush=True)
    Quarantine(root).add_item("robot/boot/7", "a test")
    with closing(DiskSpool(root / "spool" / "robot")) as spool:
        for k in range(3):
            spool.append([b"data", *codec.pack(episode(f"late-{k}", "online", "more", spool.boot_id, k).to_body())])
    card = rewards.RewardCard("outcome", 2, ("front",), 16, False, SPEC.to_dict())
    rewards.save(root / "reward", rewards.RewardClassifier(card, width=32), card, {"episodes": 3})
    stop = EmergencyStop(root / "estop")
    stop.press("a test")
    stop.close()  # written
    for name in ("gateway.log", "trainer.exit"):
        (folder.paths.logs / name).write_text("0\n")
    return root


# Damage.


def _half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    """One bit in the middle; of an empty file, a byte too many."""
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unreadable(path: Path) -> None:
    """A link to itself, which nobody can open, the superuser neither."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "empty": lambda path: os.truncate(path, 0),
    "half": _half,
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": _flip,
    "folder": _folder,
    "unreadable": _unreadable,
}


# Roles. Each returns what it found; what it raises is what its entry turns into one line and exit code 2.


@dataclass(frozen=True)
class Opened:
    """What a role made of a folder."""

    found: dict[str, Any] | None  # None: it ended
    line: str  # with which it ended


def supervisor(root: Path) -> dict[str, Any]:
    folder = prepare(run_config(root.parent, more_steps=2))
    folder.lock.close()
    return {"state": folder.state}


def gateway(root: Path) -> dict[str, Any]:
    with serving(run_config(root.parent, more_steps=2), root) as one:
        status = one.status()
        return {
            "counts": status["counts"], "eval": status["eval"], "paused": status["operator"]["paused"],
            "version": one.params.version, "stage_steps": one.progress.stage_steps, "step": one.progress.step,
            "seen": len(one.journalled.assembler.seen._ranges), "secret": (root / "ticket.secret").read_bytes(),
        }  # fmt: skip


def exporter(root: Path) -> dict[str, Any]:
    config = read_config(root / "config.yaml")
    assert config is not None
    with closing(Exporter(root, SPEC, ExporterOptions(), video=False)) as one:
        one.poll(flush=True)
        state, aside = one._writer.state, one._quarantine.count
    problems = [] if one._writer.root != root / "dataset" else _dataset_problems(root)
    return {"episodes": state.episodes, "frames": state.frames, "quarantined": aside, "problems": problems}


def _dataset_problems(root: Path) -> list[str]:
    """What the durability oracle says of the dataset; the actor's ledger is another file's matter."""
    return [line for lines in check_run.check(root, ledgers=[], images=True).problems.values() for line in lines]


def policy(root: Path) -> dict[str, Any]:
    engine = PolicyEngine(read_config(root / "config.yaml"), root / "params")
    engine.refresh()
    return {"version": engine.version, "weights": digest(engine._published)}


class NoGateway:
    """Stands where the trainer's link to the gateway does: opening asks nothing of it."""


def trainer(root: Path) -> dict[str, Any]:
    one = build_trainer(read_config(root / "config.yaml"), RunPaths(root), NoGateway())
    one.rollback.check({"eval": {"after": {"episodes": 2, "successes": 2, "version": 1}}})
    best = one.rollback._watch.best
    found = {
        "step": one.learner.step_count, "weights": digest(one.learner.tensors()), "version": one.publisher.version,
        "serves": one.publisher.newest_can_be_served(), "best": (best.stage, best.rate, best.version),
        "accepted": one.data.accepted, "stage_steps": dict(one.stages.steps),
    }  # fmt: skip
    one.step_log.close()
    return found


def robot(root: Path) -> dict[str, Any]:
    with closing(DiskSpool(root / "spool" / "robot")) as spool:
        items = [hashlib.sha256(b"".join(map(bytes, spool.read(key)))).hexdigest() for key in spool.pending()]
    with closing(Ledger(root / "spool" / "robot.acknowledged.jsonl")):
        pass
    with closing(EmergencyStop(root / "estop")) as stop:
        return {"items": items, "latched": stop.reason() is not None}


def reward(root: Path) -> dict[str, Any]:
    one = rewards.load(root / "reward")
    return {"card": one.card, "weights": digest(one.state_dict())}


ROLES: Mapping[str, tuple[Callable[[Path], dict[str, Any]], tuple[type[Exception], ...]]] = {
    "supervisor": (supervisor, (RunError,)),
    "gateway": (gateway, MISTAKES),
    "exporter": (exporter, (ValueError, JournalCorrupt)),
    "policy": (policy, (ValueError, FileNotFoundError)),
    "trainer": (trainer, (ValueError, FileNotFoundError)),
    "robot": (robot, (ValueError, OSError, SpoolError)),
    "reward": (reward, (ValueError, OSError)),
}


def open_role(name: str, root: Path) -> Opened:
    """Open one role on the folder."""
    role, mistakes = ROLES[name]
    try:
        return Opened(role(root), "")
    except mistakes as mistake:
        return Opened(None, str(mistake))


def digest(tensors: Mapping[str, Any]) -> str:
    """Of tensors by name."""
    summed = hashlib.sha256()
    for name in sorted(tensors):
        summed.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return summed.hexdigest()


def files_of(root: Path) -> list[str]:
    """Every file of the run, by relative path."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def copy_of(root: Path, target: Path) -> Path:
    """A copy of the run, by the same name in another folder."""
    return Path(shutil.copytree(root, target / root.name))
