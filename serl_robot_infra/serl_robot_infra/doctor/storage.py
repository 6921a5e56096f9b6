"""Disk, shared memory, and the files that say who may do what. Called by doctor.host."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from serl_robot_infra.check.report import Report
from serl_transport.security.allow_list import read_allow_list
from serl_transport.security.files import check_private
from serl_transport.security.keys import LEARNER, read_public, read_secret

MIN_MB, WANTED_MB = 500, 20_000  # a run does not start below; an evening with cameras takes some
SHM_MB = 2_000  # of /dev/shm, where the replay ring lies
OLD_DAYS = 365
GB_MB = 1024


def check_disk(report: Report, runs: Path, learner: bool) -> None:
    """Room and the right to write where runs lie, room in shared memory, inodes."""
    place = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free >> 20
    says = f"{free / GB_MB:.1f} GB are free for {runs}"
    if free < MIN_MB:
        report.fail("disk", f"{says}; a run does not start below {MIN_MB} MB", "free some, or runs_dir=<a larger disk>")
    elif free < WANTED_MB:
        fix = "runs_dir=<a larger disk>; tools/runs.py list shows what lies there"
        report.warn("disk", f"{says}; an evening with three cameras takes tens", fix)
    else:
        report.ok("disk", says)
    try:
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        report.fail("disk", f"{place} cannot be written: {error.strerror}", f"chown it to {os.getuid()}, or runs_dir=")
    system = os.statvfs(place)
    if system.f_files and system.f_favail * 100 < system.f_files:
        report.warn("inodes", f"less than 1% are left on the disk of {place}", "remove folders of many small files")
    if learner:
        check_shared_memory(report)


def check_shared_memory(report: Report) -> None:
    """Where the replay ring goes."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        fix = "docker: --shm-size=8g or --ipc=host"
        report.warn("shared memory", "no /dev/shm to write to: the replay ring lies in the run's folder", fix)
        return
    free = shutil.disk_usage(shm).free >> 20
    says = f"{free / GB_MB:.1f} GB in /dev/shm"
    if free < SHM_MB:
        fix = "docker: --shm-size=8g; else mount -o remount,size=8g /dev/shm"
        report.warn("shared memory", f"{says}: the replay ring of large cameras goes to the disk", fix)
    else:
        report.ok("shared memory", says)


def check_keys(report: Report, keys_dir: str | None, name: str, open_to_network: bool) -> None:
    """The files of security.keys_dir: whole, and in nobody else's hands. They have no expiry; old ones are told of."""
    if not keys_dir:
        fix = "tools/keygen.py FOLDER --actor <name>, then security.keys_dir=FOLDER on both sides"
        if open_to_network:
            report.warn(
                "keys", "none, and bind_host= or ip= is no loopback: whoever reaches the learner may drive", fix
            )
        else:
            report.ok("keys", "none; on loopback none is needed")
        return
    folder = Path(keys_dir).expanduser()
    if not folder.is_dir():
        report.fail("keys", f"security.keys_dir={keys_dir}: no such folder", "tools/keygen.py makes it")
        return
    secrets = sorted(folder.glob("*.secret"))
    for path in secrets:
        _checked(report, path, lambda path=path: read_secret(path))
        days = (time.time() - path.stat().st_mtime) / 86400
        if days > OLD_DAYS:
            report.warn(
                f"key {path.stem}", f"{days:.0f} days old; keys do not expire by themselves", "new ones, yearly"
            )
    for path in (folder / f"{LEARNER}.public", folder / "allow_list"):
        if path.is_file():
            read = read_allow_list if path.name == "allow_list" else read_public
            _checked(report, path, lambda path=path, read=read: read(path))
    if (folder / f"{LEARNER}.secret") not in secrets and (folder / f"{name}.secret") not in secrets:
        report.fail(
            "keys", f"{folder} has neither {LEARNER}.secret nor {name}.secret", f"unique_identifier= or --actor {name}"
        )
    elif len(secrets) > 2 and (folder / "allow_list").is_file():
        fix = "scp -p each to its own host, then delete it here"
        report.warn("keys", f"{len(secrets)} secrets lie in one folder; a secret has one home", fix)


def _checked(report: Report, path: Path, read: object) -> None:
    try:
        read()  # type: ignore[operator]
    except (ValueError, OSError) as problem:
        words = str(problem)
        at = words.find("chmod")
        report.fail(f"key {path.stem}", words, words[at:] if at >= 0 else "tools/keygen.py, in a new folder")
    else:
        report.ok(f"key {path.stem}", f"{path.name} is whole, and nobody else's to change")


def check_secret_files(report: Report, paths: dict[str, str]) -> None:
    """Files that a config's `file:` references name. key -> path."""
    for key, text in paths.items():
        try:
            check_private(Path(text).expanduser())
        except FileNotFoundError:
            report.fail(key, f"no file {text}", f"make it, mode 0600, or give {key}=env:NAME")
        except (ValueError, OSError) as problem:
            report.fail(key, str(problem), f"chmod 600 {text}")
        else:
            report.ok(key, f"{text} is this user's alone")
