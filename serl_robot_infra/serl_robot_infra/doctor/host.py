"""The whole examination of a host, question after question. Called by tools/doctor.py.

config of the words (or its defaults) ─▶ environment ─▶ disk ─▶ keys ─▶ network ─▶ GPU ─▶ devices ─▶ renderer ─▶ Report
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serl_robot_infra.check.report import Report
from serl_robot_infra.doctor.environment import check_environment
from serl_robot_infra.doctor.hardware import check_devices, check_gpu, check_renderer, importable
from serl_robot_infra.doctor.network import check_learner_name, check_loopback, check_ports
from serl_robot_infra.doctor.storage import check_disk, check_keys, check_secret_files
from serl_transport.security.auth import is_loopback


def examine(report: Report, root: Path, config: Mapping[str, Any]) -> None:
    """Ask everything of this host. root: the checkout; config: resolved, plain containers."""
    learner = importable("serl_launcher")
    check_environment(report, root)
    check_disk(report, Path(config["runs_dir"]), learner)
    security = config.get("security") or {}
    ends = [str(end) for end in (config["bind_host"], config.get("ip")) if end is not None]
    exposed = not config.get("insecure") and not all(map(is_loopback, ends))
    check_keys(report, security.get("keys_dir"), str(config["unique_identifier"]), exposed)
    check_secret_files(report, dict(references(config)))
    check_loopback(report)
    if learner:
        check_ports(report, str(config["bind_host"]), ports(config))
    else:
        report.skip("ports", "a robot host listens on none")
    check_learner_name(report, config.get("ip"))
    check_gpu(report, importable("torch"), learner)
    check_devices(report)
    check_renderer(report)


def ports(config: Mapping[str, Any]) -> dict[str, int]:
    """Key -> port that a learner of this config listens on; those that it may choose are left out."""
    wanted = {"port": config["port"], "broadcast_port": config["broadcast_port"]}
    reward = config.get("reward") or {}
    if "model" in reward:
        wanted |= {"reward.port": reward["port"], "reward.port + 1": reward["port"] + 1}
    if port := (config.get("serving") or {}).get("openpi_port"):
        wanted["serving.openpi_port"] = port
    return {key: port for key, port in wanted.items() if isinstance(port, int) and port}


def references(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, path) of each `file:PATH` in a config."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(value, str) and value.startswith("file:"):
            yield f"{prefix}{key}", value.removeprefix("file:")
        else:
            yield from references(value, f"{prefix}{key}.")
