"""What the follower reads of config.yaml, validated once; a mistake becomes one line for the user."""

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from serl_launcher.replay.ring_layout import MEMORY_SHARE
from serl_launcher.run.config import task_spec
from serl_launcher.run.first_host import host_name
from serl_transport.contract.bounds import check_number, check_whole
from serl_transport.contract.specs import TaskSpec


@dataclass(frozen=True, slots=True)
class FollowerSettings:
    """One field per key."""

    run: str  # run
    spec: TaskSpec  # task.spec
    name: str  # host-<launch.machine_rank>, by which the gateway knows this host
    gateway: str  # launch.main_host and port, for people
    capacity_frames: int  # replay.capacity_frames, as the gateway's
    memory_share: float  # replay.memory_share, this host's
    mbit_s: float | None  # follower.mbit_s: of the journal over the wire at most; None: no bound
    patience_s: float  # follower.patience_s: the run stops here when the gateway is silent for longer
    config: dict[str, Any]  # all of it, which must be the gateway's

    @staticmethod
    def of(cfg: DictConfig) -> "FollowerSettings":
        """From a resolved config. ValueError names the key."""
        mbit_s = OmegaConf.select(cfg, "follower.mbit_s")
        share = OmegaConf.select(cfg, "replay.memory_share", default=MEMORY_SHARE)
        return FollowerSettings(
            run=cfg.run,
            spec=task_spec(cfg),
            name=host_name(check_whole("launch.machine_rank", cfg.launch.machine_rank, 1, 4095)),
            gateway=f"{cfg.launch.main_host}:{cfg.port}",
            capacity_frames=check_whole("replay.capacity_frames", cfg.replay.capacity_frames, 2, 1 << 40),
            memory_share=check_number("replay.memory_share", share, 0, 1),
            mbit_s=None if mbit_s is None else check_number("follower.mbit_s", mbit_s, 0.01, 1e6),
            patience_s=check_number("follower.patience_s", cfg.follower.patience_s, 1.0, 1e6),
            config=OmegaConf.to_container(cfg, resolve=True),  # type: ignore[arg-type]
        )
