"""Python, the installed packages against the lock, the members of this checkout. Called by doctor.host."""

import importlib.metadata
import importlib.util
import re
import shutil
import sys
from pathlib import Path

from serl_robot_infra.check.report import Report

KINDS = ("learner", "lerobot", "actor")  # each serves those after it
MEMBERS = ("flowserl_cli", "serl_config", "serl_transport", "openpi_client", "serl_robot_infra")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)\s*(?:;\s*([^\\]+))?")
SHOWN = 6


def kind_of(root: Path) -> str | None:
    """Which environment tools/bootstrap.sh made in this checkout; None: none that is whole."""
    return next((kind for kind in KINDS if (root / ".venv" / f".flowserl-{kind}").is_file()), None)


def check_environment(report: Report, root: Path) -> None:
    """Python's version, the environment's kind, each pinned package, and whose code is imported."""
    have = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 12):
        report.ok("python", f"{have}, {sys.executable}")
    else:
        report.fail("python", f"{have}; 3.12 is what is pinned and tested", "FLOWSERL_PYTHON=<a 3.12> bash start.sh")
    kind = kind_of(root)
    if kind is None:
        fix = "bash tools/bootstrap.sh, on a robot host: bash tools/bootstrap.sh actor"
        report.fail("environment", f"{root / '.venv'} was not made, or not to its end", fix)
    else:
        report.ok("environment", f"{kind}, in {root / '.venv'}")
        check_lock(report, root / "requirements" / f"{kind}.txt", f"bash tools/bootstrap.sh {kind}")
    check_members(report, root, kind)
    check_tools(report, kind)


def pins(text: str) -> dict[str, str]:
    """name -> version of the packages that a lock file wants on this machine."""
    found = {}
    for line in text.splitlines():
        if (pin := _PIN.match(line)) and _applies(pin[3]):
            found[pin[1].lower().replace("_", "-")] = pin[2]
    return found


def _applies(marker: str | None) -> bool:
    if not marker:
        return True
    try:
        from packaging.markers import InvalidMarker, Marker
    except ImportError:
        return False  # nobody can say: not looked at
    try:
        return Marker(marker.strip()).evaluate()
    except InvalidMarker:
        return False


def check_lock(report: Report, lock: Path, fix: str) -> None:
    """Every pinned package is there, in its version; a build such as 2.11.0+cpu is that version."""
    if not lock.is_file():
        report.fail("packages", f"{lock} is missing", "a whole checkout: git status, git restore requirements")
        return
    wanted = pins(lock.read_text(encoding="utf-8"))
    there = {
        (found.metadata["Name"] or "").lower().replace("_", "-"): found.version
        for found in importlib.metadata.distributions()
    }
    missing = [name for name in wanted if name not in there and not name.startswith(("nvidia-", "cuda-", "triton"))]
    other = [
        f"{name} {there[name]}, locked {version}"
        for name, version in wanted.items()
        if name in there and there[name].partition("+")[0] != version.partition("+")[0]
    ]
    if missing:
        report.fail("packages", f"{len(missing)} of {len(wanted)} are missing: {', '.join(missing[:SHOWN])}", fix)
    if other:
        report.warn("versions", f"{len(other)} differ from {lock.name}: {'; '.join(other[:SHOWN])}", fix)
    if not missing and not other:
        report.ok("packages", f"{len(wanted)} pinned in {lock.name}, all there in their versions")


def check_members(report: Report, root: Path, kind: str | None) -> None:
    """What is imported is this checkout's, not another's or an old copy."""
    wanted = [*MEMBERS, *(["serl_launcher"] if kind == "learner" else [])]
    before = len(report.findings)
    for name in wanted:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            report.fail("checkout", f"{name} cannot be imported", "bash tools/bootstrap.sh")
        elif not Path(spec.origin).resolve().is_relative_to(root.resolve()):
            fix = f"start this with {root / '.venv/bin/python'}; bash tools/bootstrap.sh; look at PYTHONPATH"
            report.fail("checkout", f"{name} is imported from {spec.origin}, not from {root}", fix)
    if len(report.findings) == before:
        report.ok("checkout", f"{len(wanted)} packages are imported from {root}")
    if kind != "learner":
        report.skip("learner", "its packages are not installed here (a robot host has none): not looked at")


def check_tools(report: Report, kind: str | None) -> None:
    """Programs that a start calls."""
    if shutil.which("tmux"):
        report.ok("tmux", "two panes with start.sh")
    else:
        fix = "apt install tmux for two panes; without it start.sh uses one window"
        report.warn("tmux", "not installed", fix)
    if not shutil.which("git"):
        report.warn("git", "not installed: a run's record cannot say which commit it was", "apt install git")
    if kind in (None, "learner") and not (shutil.which("cc") or shutil.which("gcc")):
        report.warn("compiler", "no cc: bootstrap.sh and policy.compile need one", "apt install build-essential")
