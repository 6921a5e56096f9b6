"""How many trainer processes a run starts and how, by `launch` in the config. Torch-free; supervisor.roles asks.

launch=one       one process               launch=zero2, fsdp2   the same number, the state of training in parts
launch=several   one a visible GPU          launch=nodes          the same on several machines
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from serl_transport.security.auth import is_loopback

ENGINES = ("plain", "ddp", "zero2", "fsdp2")
MAIN_HOST = "the name or address of the first machine, as the others reach it"
KEYS = ("engine", "num_processes", "num_machines", "machine_rank", "main_host", "main_port", "mixed_precision")


def trainer_command(cfg: DictConfig, module: str, *args: str) -> tuple[str, ...]:
    """What the trainer role runs: `module` under a lifeline, or several of them."""
    here = ranks_here(cfg)
    if here * cfg.launch.num_machines == 1:
        return (sys.executable, "-m", "serl_launcher.supervisor.lifeline", module, *args)
    plan = {
        "here": here,
        "world": here * cfg.launch.num_machines,
        "first": here * cfg.launch.machine_rank,
        "threads": cfg.trainer.threads,
        "address": cfg.launch.main_host,
        "port": cfg.launch.main_port,
    }
    return (sys.executable, "-m", "serl_launcher.supervisor.several", json.dumps(plan), module, *args)


def ranks_here(cfg: DictConfig) -> int:
    """Trainer processes on this machine: `auto` is one for each visible GPU, and one on a CPU."""
    asked = cfg.launch.num_processes
    if asked != "auto":
        return asked
    return max(1, visible_gpus()) if cfg.trainer.device != "cpu" else 1


def visible_gpus() -> int:
    """CUDA devices that a process started from here would see, without importing torch: those of CUDA_VISIBLE_DEVICES,
    else those whose files the driver made."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        names = [name.strip() for name in given.split(",")]
        return next((k for k, name in enumerate(names) if name in ("", "-1")), len(names))
    files = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    listed = Path("/proc/driver/nvidia/gpus")
    return len(files) or (len(list(listed.iterdir())) if listed.is_dir() else 0)


def is_follower(cfg: DictConfig) -> bool:
    """Is this a machine beyond the first, whose ranks train on what the first one's gateway sends?"""
    number = OmegaConf.select(cfg, "launch.machine_rank")
    return isinstance(number, int) and number > 0


def check_launch(cfg: DictConfig) -> None:
    """Can the trainer be started so? ValueError names the key, what came and what is expected."""
    launch = cfg.launch
    if OmegaConf.is_missing(launch, "main_host"):
        raise ValueError(f"launch.main_host: expected {MAIN_HOST}, got none")
    for key in launch:
        _expect(key in KEYS, f"launch.{key}", launch[key], f"one of the keys {', '.join(KEYS)}")
    _expect(launch.engine in ENGINES, "launch.engine", launch.engine, " | ".join(ENGINES))
    auto = launch.num_processes == "auto"
    _expect(auto or _count(launch.num_processes), "launch.num_processes", launch.num_processes, "auto or from 1")
    _check_machines(cfg)
    _check_ranks(cfg, ranks_here(cfg))
    if launch.mixed_precision not in (None, False, "no"):
        raise ValueError(
            f"launch.mixed_precision={launch.mixed_precision}: expected no: policy.precision (float32 or bfloat16) "
            "decides in which numbers a policy is held and computed"
        )


def _check_machines(cfg: DictConfig) -> None:
    launch = cfg.launch
    machines, number = launch.num_machines, launch.machine_rank
    _expect(_count(machines), "launch.num_machines", machines, "a whole number from 1")
    known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < machines
    _expect(known, "launch.machine_rank", number, f"from 0 to {machines - 1} (launch.num_machines - 1)")
    if machines == 1:
        return
    _expect(bool(launch.main_host), "launch.main_host", launch.main_host, MAIN_HOST)
    port = launch.main_port
    _expect(_count(port) and port <= 65535, "launch.main_port", port, "a port of the first machine")
    if number == 0 and is_loopback(cfg.bind_host) and not is_loopback(launch.main_host):
        raise ValueError(
            f"bind_host={cfg.bind_host}: the other machines find no gateway at launch.main_host={launch.main_host}; "
            "give bind_host=0.0.0.0, with security.keys_dir (tools/keygen.py --follower host-1) or insecure=true"
        )
    if number and not any(stage.get("steps") for stage in cfg.schedule.stages):
        raise ValueError(
            f"launch.machine_rank={number}: no stage of the schedule trains, so there is nothing to do here"
        )


def _check_ranks(cfg: DictConfig, here: int) -> None:
    gpus, world = visible_gpus(), here * cfg.launch.num_machines
    if gpus and cfg.trainer.device != "cpu" and here > gpus:
        raise ValueError(
            f"launch.num_processes={here}: expected at most {gpus}, a process for each visible GPU; "
            f"set launch.num_processes={gpus} or auto"
        )
    if world > 1 and cfg.launch.engine == "plain":
        raise ValueError(
            f"launch.engine=plain: expected ddp, zero2 or fsdp2 for {world} processes; take launch=several, zero2 or "
            "fsdp2, or launch=one"
        )
    if cfg.trainer.batch_size % world:
        raise ValueError(
            f"trainer.batch_size={cfg.trainer.batch_size}: expected a multiple of {world}, it is shared by the "
            f"processes of launch; set trainer.batch_size={-(-cfg.trainer.batch_size // world) * world}, or "
            "launch.num_processes"
        )


def _count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _expect(holds: bool, key: str, got: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key}={got}: expected {expected}")
