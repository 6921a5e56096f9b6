"""Sets of demonstrations for seeded_mistakes.py: good ones, and one in a person's hands (`Case`), to be spoiled.

arm(), cart(), …, simulated() ─▶ Made ─▶ write: a LeRobotDataset and a config ─▶ Case ─▶ spoiled ─▶ save
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets import LeRobotDataset
from omegaconf import OmegaConf
from PIL import Image

from flowserl_cli.compose import load_config
from serl_launcher.exporter.statistics import vector_stats
from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize
from serl_robot_infra.wiring import build_env
from serl_transport.contract.specs import TaskSpec

JOINTS = ["pan", "lift", "elbow", "flex", "roll", "gripper"]
SIZE, PROMPT = (24, 32), "put the pen away"


@dataclass
class Made:
    """A set of demonstrations in memory."""

    what: str
    state: list[np.ndarray]  # an episode each, float32[n, s]
    action: list[np.ndarray]
    names: tuple[list[str], list[str]]  # of states and actions
    fps: int
    moves: list[int] | None = None  # task.noop_dims
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)  # camera -> uint8[n, h, w, 3] an episode
    prompt: str = PROMPT
    spec: dict[str, Any] | None = None  # of a simulator; else made of the values


def smooth(rng: np.random.Generator, n: int, dims: int, reach: float) -> np.ndarray:
    """float32[n, dims]: a walk through a few points, as an operator moves."""
    points = rng.uniform(-reach, reach, (2 + n // 12, dims))
    at = np.linspace(0, len(points) - 1, n)
    return np.stack([np.interp(at, np.arange(len(points)), points[:, k]) for k in range(dims)], 1)


def arm(
    what: str = "arm, degrees", seed: int = 0, unit: float = 1.0, fps: int = 30, noise: float = 0.05,
    pause: float = 0.0, n: int = 50, follow: float = 0.5,
) -> Made:  # fmt: skip
    """Six joints that follow absolute targets; the gripper closes half way. unit: of the angles, in degrees."""
    rng, states, actions = np.random.default_rng(seed), [], []
    for _ in range(6):
        wish = np.concatenate([smooth(rng, n, 5, 60), np.where(np.arange(n) < n // 2, 90, 10)[:, None]], 1)
        wish = np.concatenate([np.repeat(wish[:1], int(pause * n), 0), wish])
        at, seen = wish[0].copy(), []
        for target in wish:
            seen.append(at + rng.normal(0, noise, 6) * (not pause))
            at = at + follow * (target - at)
        states.append(np.float32(np.stack(seen) * [*[unit] * 5, 1]))
        actions.append(np.float32(wish * [*[unit] * 5, 1]))
    return looks(Made(what, states, actions, (JOINTS, JOINTS), fps), rng)


def deltas(what: str = "joint deltas", seed: int = 1, names: Sequence[str] = JOINTS, fps: int = 10) -> Made:
    """Displacements of each tick, named apart; what is commanded is not quite reached."""
    rng, made = np.random.default_rng(seed), arm(seed=seed)
    for state, action in zip(made.state, made.action, strict=True):
        move = np.diff(state, axis=0, append=state[-1:])
        action[:] = move * 1.1 + rng.normal(0, 0.02, move.shape)
    made.what, made.names, made.fps = what, (list(names), [f"d{n}" for n in names]), fps
    made.moves = list(range(6))
    return made


def cart(what: str = "a hand's displacements and a grip command", seed: int = 2) -> Made:
    """Cartesian displacements in metres; the grip is −1 or 1."""
    rng, states, actions = np.random.default_rng(seed), [], []
    for _ in range(6):
        path = smooth(rng, 60, 3, 0.2)
        move = np.diff(path, axis=0, append=path[-1:])
        grip = np.where(np.arange(60) < 30, -1.0, 1.0)[:, None]
        states.append(np.float32(np.concatenate([path, 0.5 - 0.4 * grip], 1)))
        actions.append(np.float32(np.concatenate([move + rng.normal(0, 1e-4, move.shape), grip], 1)))
    names = (["x", "y", "z", "opening"], ["dx", "dy", "dz", "grip"])
    return looks(Made(what, states, actions, names, 10, moves=[0, 1, 2]), rng)


def looks(made: Made, rng: np.random.Generator) -> Made:
    """Two cameras that see the state move, before backgrounds of their own."""
    grounds = {"front": rng.integers(20, 120, (*SIZE, 3)), "wrist": rng.integers(90, 230, (*SIZE, 3))}
    for camera, ground in grounds.items():
        made.pictures[camera] = []
        for state in made.state:
            low, high = state.min(0), state.max(0)
            place = (state - low) / np.maximum(high - low, 1e-9)
            frames = np.repeat(ground[None], len(state), 0) + rng.integers(-3, 4, (len(state), *SIZE, 3))
            for t, at in enumerate(place):
                y, x = int(at[0] * 18), int(at[1] * 26)
                frames[t, y : y + 6, x : x + 6] = (240, 60, 40)
            made.pictures[camera].append(frames.clip(0, 255).astype(np.uint8))
    return made


def simulated(task: str, what: str, noise: float = 0.0, episodes: int = 5) -> Made:
    """Demonstrations of the scripted operator in one of the project's simulators."""
    cfg = load_config([f"task={task}"])
    env = build_env(cfg, TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True)))
    spec = env.spec
    made = Made(what, [], [], (list(spec.state_names), list(spec.action_names)), int(spec.control_hz))
    made.moves, made.prompt, made.spec = list(cfg.task.noop_dims), spec.prompt, spec.to_dict()
    made.pictures = {camera: [] for camera in spec.cameras}
    for seed in range(episodes):
        seen, expert = env.reset(seed, actuator_noise=noise), env.expert()
        expert.reset()
        rows: list[tuple] = []
        for _ in range(spec.max_ticks):
            action = np.clip(expert.act(), spec.action_low, spec.action_high).astype(np.float32)
            result = env.step(action)
            rows.append((seen.state, action, seen.images))
            seen = result.observation
            if result.terminated or result.truncated:
                break
        made.state.append(np.stack([row[0] for row in rows]))
        made.action.append(np.stack([row[1] for row in rows]))
        for camera in spec.cameras:
            made.pictures[camera].append(np.stack([row[2][camera] for row in rows]))
    env.close()
    return made


CLEAN: dict[str, Callable[[], Made]] = {
    "degrees": arm,
    "radians": lambda: arm("arm, radians, 20 Hz", seed=3, unit=0.01745, fps=20),
    "pauses": lambda: arm("arm, a pause before each episode", seed=4, pause=0.2),
    "slow": lambda: arm("arm, slow, 50 Hz, 150 ticks", seed=5, n=150, fps=50, follow=0.2),
    "noisy": lambda: arm("arm, noisy encoders, quick servos", seed=6, noise=0.5, follow=0.9),
    "deltas": deltas,
    "cart": cart,
    "pick": lambda: simulated("pick", "pick, the scripted operator"),
    "pick_noise": lambda: simulated("pick", "pick, disturbed demonstrations", noise=0.15),
    "fetch": lambda: simulated("fetch_pick_and_place", "fetch_pick_and_place, the scripted operator", episodes=4),
}


def write(folder: Path, made: Made) -> tuple[Path, dict[str, Any]]:
    """By LeRobot itself; the folder, and a run's config with the task that it is for."""
    sizes = {camera: list(seen[0].shape[1:3]) for camera, seen in made.pictures.items()}
    features: dict[str, Any] = {
        f"observation.images.{c}": {"dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for c, size in sizes.items()
    }
    for key, names in zip(("observation.state", "action"), made.names, strict=True):
        features[key] = {"dtype": "float32", "shape": (len(names),), "names": names}
    dataset = LeRobotDataset.create("local/seeded", fps=made.fps, features=features, root=folder, use_videos=False)
    for e, (state, action) in enumerate(zip(made.state, made.action, strict=True)):
        for t in range(len(state)):
            frame = {f"observation.images.{c}": made.pictures[c][e][t] for c in sizes}
            dataset.add_frame(frame | {"observation.state": state[t], "action": action[t], "task": made.prompt})
        dataset.save_episode()
    dataset.finalize()
    return folder, config(made, sizes)


def config(made: Made, sizes: dict[str, list[int]]) -> dict[str, Any]:
    """As a person would write it: ranges a little wider than what was recorded."""
    spec: dict[str, Any] = {"name": "seeded", "prompt": made.prompt, "cameras": sizes, "control_hz": float(made.fps)}
    for what, episodes, names in (("state", made.state, made.names[0]), ("action", made.action, made.names[1])):
        values = np.concatenate(episodes)
        low, high = values.min(0), values.max(0)
        room = 0.1 * (high - low) + 1e-3
        spec |= {f"{what}_names": names, f"{what}_low": (low - room).tolist(), f"{what}_high": (high + room).tolist()}
    cfg = OmegaConf.to_container(load_config(["policy=pi0_tiny"]), resolve=True)
    cfg["rollout"]["rate_hz"] = None
    cfg["task"] = {"name": "seeded", "spec": made.spec or {**spec, "max_ticks": 400}, "noop_dims": made.moves}
    return cfg


class Case:
    """A written set and its config, to be spoiled: the rows are `state`, `action` (float32[n, d]) and `pictures`."""

    def __init__(self, folder: Path, cfg: dict[str, Any]) -> None:
        self.folder, self.cfg = folder, cfg
        self.status: dict[str, Any] = {}
        (self._file,) = sorted((folder / "data").rglob("*.parquet"))
        self._table = pq.read_table(self._file)
        self.state, self.action = (
            np.float32(np.stack(self._table[k].to_pylist())) for k in ("observation.state", "action")
        )
        self.episode = np.array(self._table["episode_index"].to_pylist())
        keys = [k for k in self._table.column_names if k.startswith("observation.images.")]
        self.pictures = {k.removeprefix("observation.images."): self._table[k].to_pylist() for k in keys}
        self._values, self._stats_edit = (self.state.copy(), self.action.copy()), None
        self._more: dict[str, Any] = {}

    @property
    def spec(self) -> dict[str, Any]:
        return self.cfg["task"]["spec"]

    @property
    def black(self) -> dict[str, Any]:
        """A picture without light, as a row holds it."""
        file = io.BytesIO()
        Image.new("RGB", SIZE[::-1]).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": "black.png"}

    def episodes(self) -> list[tuple[int, int]]:
        """First row and end of each."""
        return [(int(rows[0]), int(rows[-1]) + 1) for e in np.unique(self.episode)
                for rows in [np.flatnonzero(self.episode == e)]]  # fmt: skip

    def set(self, key: str, value: Any) -> None:
        """A dotted key of the config."""
        node, parts = self.cfg, key.split(".")
        for part in parts[:-1]:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(parts[-1])] = value
        else:
            node[parts[-1]] = value

    def info(self, edit: Callable[[dict], Any]) -> None:
        """Change meta/info.json."""
        path = self.folder / "meta" / "info.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def stats(self, edit: Callable[[dict], Any]) -> None:
        """Change meta/stats.json."""
        path = self.folder / "meta" / "stats.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    def tasks(self, texts: list[str]) -> None:
        """Replace the task texts."""
        path = self.folder / "meta" / "tasks.parquet"
        table = pandas.read_parquet(path)
        table.index = pandas.Index(texts, name=table.index.name)
        table.to_parquet(path)

    def column(self, key: str, dtype: str, values: np.ndarray) -> None:
        """One more column of single numbers."""
        self.info(lambda info: info["features"].update({key: {"dtype": dtype, "shape": [1], "names": None}}))
        self._more[key] = pa.array(values)

    def checkpoint(self, scale: float) -> None:
        """The policy comes from a checkpoint whose statistics are `scale` times what was recorded."""
        folder, spec = self.folder.parent / f"checkpoint{scale}", TaskSpec.from_dict(self.spec)
        size = TinySize(width=16, vision_width=16, image_size=32, conv_stem=False)
        policy = build_pi0("t", spec, "random", 0, 8, size)
        for units in (policy.state_units, policy.action_units):
            units.scale.mul_(scale)
        policy.save(folder)
        self.cfg["policy"] |= {"init": "checkpoint", "checkpoint": str(folder)}

    def trained(self, **spec: Any) -> None:
        """The parameters come from a run whose task differed in these keys."""
        run = self.folder.parent / f"trained_{self.folder.name}"
        run.mkdir(exist_ok=True)
        theirs = json.loads(json.dumps(self.cfg))
        theirs["task"]["spec"] |= spec
        OmegaConf.save(OmegaConf.create(theirs), run / "config.yaml")
        self.cfg["checkpoint_path"] = str(run)

    def save(self) -> None:
        """Write rows that were changed; their statistics are made anew, as a tool would."""
        table = self._table
        columns = {"observation.state": self.state, "action": self.action}
        for (key, values), was in zip(columns.items(), self._values, strict=True):
            if not np.array_equal(values, was, equal_nan=True):
                table = _replaced(table, key, pa.array(list(values), table.schema.field(key).type))
                if np.isfinite(values).all():
                    self.stats(lambda stats, k=key, v=values: stats[k].update(_plain(vector_stats(v))))
        for camera, pictures in self.pictures.items():
            key = f"observation.images.{camera}"
            table = _replaced(table, key, pa.array(pictures, table.schema.field(key).type))
        for key, values in self._more.items():
            table = table.append_column(key, values)
        table = table.replace_schema_metadata({} if self._more else self._table.schema.metadata)
        pq.write_table(table, self._file)


def _replaced(table: pa.Table, key: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(key), table.schema.field(key), values)


def _plain(stats: dict[str, np.ndarray]) -> dict[str, list]:
    return {name: value.tolist() for name, value in stats.items()}
