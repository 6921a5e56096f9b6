"""What the gateway reads of config.yaml, validated once, by `__main__`; a mistake becomes one line for the user."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from serl_launcher.run.config import read_config
from serl_launcher.run.schedule import Stage, read_stages
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """One field per key."""

    run: str  # run
    spec: TaskSpec  # task.spec
    stages: tuple[Stage, ...]  # schedule.stages
    seed: int = 0  # seed
    port: int = 5588  # port; 0: any free one
    broadcast_port: int = 5589  # broadcast_port; 0: any free one
    bind_host: str = "127.0.0.1"  # bind_host
    insecure: bool = False  # insecure
    keys_dir: str | None = None  # security.keys_dir: CURVE keys; None: none
    allow_list: str | None = None  # security.allow_list; None: <keys_dir>/allow_list
    capacity_frames: int = 40_000  # replay.capacity_frames: observation slots of the ring
    segment_mb: int = 256  # journal.segment_mb
    dead_actor_s: float = 30.0  # gateway.dead_actor_s: an actor silent this long is taken for dead

    @staticmethod
    def load(path: Path) -> GatewaySettings:
        """Read config.yaml. ValueError and FileNotFoundError name the key or file."""
        try:
            cfg = OmegaConf.to_container(read_config(path), resolve=True)
        except (OmegaConfBaseException, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        return GatewaySettings.of(cfg)  # type: ignore[arg-type]

    @staticmethod
    def of(cfg: dict[str, Any]) -> GatewaySettings:
        """From the resolved config as plain dicts."""
        spec = TaskSpec.from_dict(_need(cfg, "task.spec"))
        capacity = _number(cfg, "replay.capacity_frames", 40_000, 2)
        if spec.max_ticks + 1 > capacity:
            raise ValueError(
                f"replay.capacity_frames: expected at least {spec.max_ticks + 1}, one episode of task {spec.name!r} "
                f"(max_ticks + 1), got {capacity}"
            )
        return GatewaySettings(
            run=str(_need(cfg, "run")),
            spec=spec,
            stages=read_stages(_need(cfg, "schedule.stages")),
            seed=int(_get(cfg, "seed", 0)),
            port=int(_number(cfg, "port", 5588, 0, 65535)),
            broadcast_port=int(_number(cfg, "broadcast_port", 5589, 0, 65535)),
            bind_host=str(_get(cfg, "bind_host", "127.0.0.1")),
            insecure=bool(_get(cfg, "insecure", False)),
            keys_dir=_get(cfg, "security.keys_dir", None),
            allow_list=_get(cfg, "security.allow_list", None),
            capacity_frames=int(capacity),
            segment_mb=int(_number(cfg, "journal.segment_mb", 256, 1)),
            dead_actor_s=float(_number(cfg, "gateway.dead_actor_s", 30.0, 0.1)),
        )


_MISSING = object()


def _get(cfg: dict[str, Any], key: str, default: Any = _MISSING) -> Any:
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node


def _need(cfg: dict[str, Any], key: str) -> Any:
    value = _get(cfg, key)
    if value is _MISSING or value is None:
        raise ValueError(f"config: {key} is missing")
    return value


def _number(cfg: dict[str, Any], key: str, default: float, low: float, high: float = float("inf")) -> float:
    value = _get(cfg, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
        raise ValueError(f"config: {key}: expected a number, {limit}, got {value!r}")
    return value
