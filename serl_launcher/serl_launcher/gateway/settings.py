"""What the gateway reads of config.yaml, validated once, by `__main__`; a mistake becomes one line for the user."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from serl_launcher.replay.ring_layout import MEMORY_SHARE
from serl_launcher.run.config import read_config
from serl_launcher.run.schedule import Stage, read_stages
from serl_transport.contract.bounds import check_name, check_number, shown
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """One field per key; config/base.yaml has the defaults."""

    run: str  # run
    spec: TaskSpec  # task.spec
    stages: tuple[Stage, ...]  # schedule.stages
    seed: int  # seed
    port: int  # port; 0: any free one
    broadcast_port: int  # broadcast_port; 0: any free one
    bind_host: str  # bind_host
    insecure: bool  # insecure
    keys_dir: str | None  # security.keys_dir: CURVE keys; None: none
    allow_list: str | None  # security.allow_list; None: <keys_dir>/allow_list
    capacity_frames: int  # replay.capacity_frames: observation slots of the ring
    memory_share: float  # replay.memory_share: of the machine's memory, that the ring may take
    segment_mb: int  # journal.segment_mb
    dead_actor_s: float  # gateway.dead_actor_s: an actor silent this long is taken for dead
    unticketed: bool  # gateway.unticketed: are episodes taken without a ticket? auto: where there are no keys
    config: dict[str, Any]  # all of it, for what people may change of it while the run goes on

    @staticmethod
    def load(path: Path) -> "GatewaySettings":
        """Read config.yaml. ValueError names the key or file."""
        try:
            cfg = OmegaConf.to_container(read_config(path), resolve=True)
        except (OmegaConfBaseException, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        return GatewaySettings.of(cfg)  # type: ignore[arg-type]

    @staticmethod
    def of(cfg: dict[str, Any]) -> "GatewaySettings":
        """From the resolved config as plain dicts."""
        spec = TaskSpec.from_dict(_need(cfg, "task.spec"))
        capacity = _number(cfg, "replay.capacity_frames", 2)
        if spec.max_ticks + 1 > capacity:
            raise ValueError(
                f"replay.capacity_frames: expected at least {spec.max_ticks + 1}, one episode of task {spec.name!r} "
                f"(max_ticks + 1), got {capacity}"
            )
        security = cfg.get("security") or {}
        unticketed = _need(cfg, "gateway.unticketed")
        if unticketed not in (True, False, "auto"):
            raise ValueError(f"config: gateway.unticketed: expected auto, true or false, got {shown(unticketed)}")
        return GatewaySettings(
            run=check_name("config: run", _need(cfg, "run")),
            spec=spec,
            stages=read_stages(_need(cfg, "schedule.stages")),
            seed=int(_need(cfg, "seed")),
            port=int(_number(cfg, "port", 0, 65535)),
            broadcast_port=int(_number(cfg, "broadcast_port", 0, 65535)),
            bind_host=str(_need(cfg, "bind_host")),
            insecure=bool(_need(cfg, "insecure")),
            keys_dir=security.get("keys_dir"),
            allow_list=security.get("allow_list"),
            capacity_frames=int(capacity),
            memory_share=memory_share(cfg),
            segment_mb=int(_number(cfg, "journal.segment_mb", 1)),
            dead_actor_s=float(_number(cfg, "gateway.dead_actor_s", 0.1)),
            unticketed=security.get("keys_dir") is None if unticketed == "auto" else unticketed,
            config=cfg,
        )


def memory_share(cfg: dict[str, Any]) -> float:
    """replay.memory_share; configs of older releases lack it. ValueError."""
    share = (cfg.get("replay") or {}).get("memory_share", MEMORY_SHARE)
    return check_number("replay.memory_share", share, 0, 1)


def _need(cfg: dict[str, Any], key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        raise ValueError(f"config: {key} is missing")
    return value


def _number(cfg: dict[str, Any], key: str, low: float, high: float = float("inf")) -> float:
    value = _need(cfg, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
        raise ValueError(f"config: {key}: expected a number, {limit}, got {shown(value)}")
    return value
