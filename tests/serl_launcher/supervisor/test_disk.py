"""The supervisor and its children on a full disk: nothing ends of it, and the screen says so."""

import io
import sys
import threading
import time
from pathlib import Path

import pytest

from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor import disk as watch
from serl_launcher.supervisor.children import Child, ChildSpec
from serl_launcher.supervisor.disk import DiskWatch
from serl_launcher.supervisor.screen import Screen
from serl_launcher.supervisor.supervisor import GAVE_UP, Supervisor


@pytest.fixture
def disk(tmpfs):
    """A tmpfs of 1 MB and 40 files."""
    return tmpfs("size=1m,nr_inodes=40")


def fill(disk: Path) -> None:
    """Neither a byte nor a name is left."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    try:
        for k in range(100):
            (disk / f"name{k}").touch()
    except OSError:
        pass


def free(disk: Path) -> None:
    for path in [disk / "ballast", *disk.glob("name*")]:
        path.unlink()


def test_it_says_once_that_the_disk_is_full_reminds_and_says_when_there_is_room(disk, monkeypatch):
    monkeypatch.setattr(watch, "PROBE_S", 0.01)
    said = []
    one = DiskWatch(disk, said.append)

    def look(seconds=0.3):
        """As the supervisor does, for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one.look()
            time.sleep(0.01)

    look()
    assert said == []
    fill(disk)
    look()
    assert said == [
        f"the disk is full at {disk}: recording and training wait until it takes writes again; actions go on being "
        "answered"
    ]
    monkeypatch.setattr(watch, "REMIND_S", 0.0)
    one.look()
    assert len(said) == 2
    monkeypatch.undo()
    free(disk)
    look(2.0)
    assert said[2:] == [f"{disk} takes writes again: recording and training go on"]


def test_a_disk_that_hangs_is_told_and_nobody_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "HANGING_S", 0.1)
    asked = threading.Event()
    monkeypatch.setattr(DiskWatch, "_refusal", lambda one: asked.wait() and None)
    said = []
    one = DiskWatch(tmp_path, said.append)
    one.look()
    assert said == []
    time.sleep(0.3)
    one.look()
    assert said == [
        f"the disk does not answer at {tmp_path}: recording and training wait until it takes writes again; actions go "
        "on being answered"
    ]
    asked.set()


def test_a_role_starts_on_a_full_disk_with_its_log_and_without_one(disk):
    paths = RunPaths(disk)
    paths.logs.mkdir()
    paths.log("gateway").write_text("before\n")
    fill(disk)
    for name in ("gateway", "policy"):  # one with a log of before, one that never had one
        child = Child(ChildSpec(name, (sys.executable, "-S", "-c", "print('x' * 9000)"), log=paths.log(name),
                                starting_file=paths.starting(name)))  # fmt: skip
        child.start().wait(30)
        death = child.poll()
        assert death is not None
        assert death.ready  # what cannot be laid out cannot make it look as if it never came up
    free(disk)
    assert paths.log("gateway").read_text().startswith("before\n")


def test_a_screen_that_is_a_file_on_the_full_disk_does_not_end_the_run(disk):
    with (disk / "screen").open("w", buffering=1) as file:
        fill(disk)
        screen = Screen(file)
        for _ in range(20):
            screen.event("x" * 1000)
            screen.dashboard(["y" * 1000])
        free(disk)
        screen.event("room")
    assert "room" in (disk / "screen").read_text()


def test_a_finished_run_without_room_for_its_summary_is_no_success(disk, monkeypatch):
    from omegaconf import OmegaConf

    from flowserl_cli.compose import load_config

    monkeypatch.setattr("serl_launcher.supervisor.supervisor.TICK_S", 0.01)
    paths = RunPaths(disk)
    paths.config.write_text(OmegaConf.to_yaml(load_config([]), resolve=True))
    paths.status.write_text('{"run": "demo", "done": true, "stage": {}, "counts": {}}')
    fill(disk)
    out = io.StringIO()
    role = ChildSpec("gateway", (sys.executable, "-S", "-c", "import time; time.sleep(600)"), log=paths.log("gateway"))
    assert Supervisor(paths, [role], out=out).run() == GAVE_UP
    assert "is complete, but" in out.getvalue()
    assert "summary.json cannot be written: [Errno 28] No space left on device" in out.getvalue()
    assert not paths.summary.exists()
