"""benchmarks/gpu.sh --rehearse: every stage's code, tiny and on the CPU, on a host with PyTorch and our wheels."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from gpu.cases import Bench, spec_of
from gpu.device import Host

from serl_launcher.agents.build import build_policy

PYTORCH_HOST = ("torch", "torchvision", "numpy", "pillow")  # and what they depend on


def closure(names):
    """The distributions, and those that they need here."""
    found, pending = {}, list(names)
    while pending:
        name = re.split(r"[ ;<>=!~\[(]", pending.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        pending += [need for need in found[name].requires or [] if "extra ==" not in need]
    return found.values()


def bare_python(folder: Path) -> Path:
    """A Python of its own with the distributions of a PyTorch host, by links, and nothing else."""
    venv.create(folder, with_pip=True)
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    for distribution in closure(PYTORCH_HOST):
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_stage_runs_on_a_bare_pytorch_host(tmp_path, repo_root):
    """Wheels are made as for the card's host; none of video, datasets, pandas or Arrow is there."""
    wheels, python = tmp_path / "wheels", bare_python(tmp_path / "bare")
    subprocess.run(["bash", "benchmarks/gpu_wheels.sh", str(wheels)], cwd=repo_root, check=True)
    have = json.loads(subprocess.check_output([python, "-m", "pip", "list", "--format=json"]))
    assert not {"lerobot", "transformers", "av", "pandas", "pyarrow"} & {row["name"].lower() for row in have}
    out, command = tmp_path / "out", ["bash", "benchmarks/gpu.sh", str(tmp_path / "out"), "--wheels", str(wheels)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"FLOWSERL_PYTHON": str(python)}
    done = subprocess.run([*command, "--rehearse"], cwd=repo_root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (out / "log.txt").read_text()[-4000:]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    ended = {row["stage"]: row["ended"] for row in rows if "ended" in row}
    assert len(ended) == 12
    assert set(ended.values()) == {"ok"}
    figures = {row["name"]: row for row in rows if "value" in row}
    for name in (
        "pi0/graph",
        "pi0/compiled",
        "groot/compiled",
        "pi0_step",
        "pi0_full_step",
        "pi05/graph",
        "swap/beside",
    ):
        assert figures[name]["value"] > 0
    assert figures["pi0/graph/profile"]["groups"]["matrix products"][0] > 10
    assert figures["tests/passed"]["value"] > 5
    assert "every stage went through" in done.stdout


class Shapes(Host):
    """A device whose tensors have no values: what reads one while a policy is made there fails, as it would wait for a
    card."""

    torch_device = torch.device("meta")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pi0", "groot", "pi05"])
def test_released_policies_are_made_on_the_device_whole(case, tmp_path):
    cfg = Bench("released", Shapes(), tmp_path).built_there(case)
    policy = build_policy(cfg, spec_of(cfg))
    assert {p.device.type for p in policy.state_dict().values()} == {"meta"}
    assert 3.0e9 < sum(p.numel() for p in policy.parameters()) < 3.7e9
