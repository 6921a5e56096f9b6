"""The power is cut under a learner at random moments: what an actor was told, and acknowledged, is there afterwards.

A whole learner (gateway, exporter, trainer that publishes and checkpoints every few steps) works on an ext4 image while
an actor on another disk feeds it. Each moment stops the processes and copies the image as the disk has it: what the
kernel had not written yet is lost, as it would be. Then each copy is mounted and the roles are opened on it.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos import SEED
from fault_actor import make_spec
from omegaconf import OmegaConf
from replay_samples import journal_items
from rig import Rig, environment, until
from tiny import tiny_config

from serl_launcher.exporter.role import Exporter, ExporterOptions
from serl_launcher.gateway.app import Gateway
from serl_launcher.gateway.settings import GatewaySettings
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.run.config import read_config
from serl_launcher.run.paths import RunPaths
from serl_robot_infra.estop import EmergencyStop
from serl_transport import TrainerClient, TrainerConfig

IMAGE_MB = 128
SPEC = make_spec()


@dataclass(frozen=True)
class Cut:
    """One moment."""

    image: Path  # of the disk
    acknowledged: set[tuple[str, int]]  # (boot, seq) that the actor had noted before
    told: int  # highest policy version that an actor had heard of before
    latched: bool  # the e-stop had been pressed before


def command(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def disk(tmp_path):
    """An ext4 image and where it is mounted; skipped where this user may not mount one."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_MB << 20)
    try:
        command("mkfs.ext4", "-q", image)
        command("mount", "-o", "loop", image, folder)
    except OSError as error:
        pytest.skip(f"cannot mount an ext4 image here: {error}")
    yield image, folder
    command("umount", "-l", folder)


class Learner(Rig):
    """The rig's gateway, with an exporter and a trainer beside it."""

    def __init__(self, run: Path, robot: Path) -> None:
        super().__init__(run)
        self.robot, self.roles = robot, []
        cfg = tiny_config(
            run="faults", runs_dir=str(run.parent), port=self.ports[0], broadcast_port=self.ports[1],
            replay__capacity_frames=2000, trainer__batch_size=2, trainer__device="cpu", trainer__publish_period=3,
            trainer__checkpoint_period=5, trainer__log_period=5, trainer__max_steps_per_tick=100.0,
            telemetry__tensorboard=False, exporter__video=False, exporter__period_s=1.0, algo__min_accepted=1,
            algo__rule__require_success=False, algo__rule__min_return=0.0, algo__rule__noop_threshold=0.0,
            algo__rule__min_ticks=0,
        )  # fmt: skip
        cfg.task = {"name": "fault", "spec": SPEC.to_dict(), "noop_dims": None, "rate_hz": SPEC.control_hz}
        cfg.schedule = {"stages": [{"name": "online", "mode": "online", "steps": 10**9}]}
        (run / "config.yaml").write_text(yaml.safe_dump(OmegaConf.to_container(cfg, resolve=True)))

    def start(self) -> None:
        """Gateway, exporter, trainer, and an actor whose files lie on another disk."""
        self.start_gateway()
        for module in ("exporter", "learner"):
            with (self.run / f"{module}.log").open("a") as log:
                argv = [sys.executable, "-m", f"serl_launcher.{module}", str(self.run)]
                self.roles.append(subprocess.Popen(argv, env=environment(), stdout=log, stderr=log))
        with (self.robot / "robot.log").open("a") as log:
            options = {"run": str(self.robot), "name": "robot-1", "port": self.ports[0],
                       "broadcast_port": self.ports[1], "ticks": 10}  # fmt: skip
            script = Path(__file__).with_name("fault_actor.py")
            argv = [sys.executable, str(script), json.dumps(options)]
            self.actors.append(subprocess.Popen(argv, env=environment(), stderr=log))

    def acknowledged_items(self) -> set[tuple[str, int]]:
        path = self.robot / "spool" / "robot-1.acknowledged.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
        return {(row["boot"], row["seq"]) for row in rows}

    @contextmanager
    def stopped(self):
        """The learner's processes hold still."""
        roles = [self.gateway, *self.roles]
        for role in roles:
            role.send_signal(signal.SIGSTOP)
        yield
        for role in roles:
            role.send_signal(signal.SIGCONT)

    def close(self) -> None:
        for role in self.roles:
            role.kill()
            role.wait()
        super().close()


@contextmanager
def listener(ports: tuple[int, int]):
    """What an actor's client is told of policy versions, in a list that grows."""
    client, told = TrainerClient("robot-2", "127.0.0.1", TrainerConfig(*ports), spec=SPEC), []
    client.on_notify(lambda body: told.append(body["version"]) if body["topic"] == "params" else None)
    try:
        yield told
    finally:
        client.stop()


def content_of_disk(image: Path) -> bytes:
    """What is on the disk now; read until it holds still, since the kernel may be writing."""
    before = image.read_bytes()
    while (now := image.read_bytes()) != before:
        before = now
    return now


def write_sparse(path: Path, content: bytes, block: int = 1 << 16) -> None:
    """Blocks of zeros take no room."""
    with path.open("wb") as file:
        for start in range(0, len(content), block):
            if content.count(0, start, start + block) < len(content[start : start + block]):
                file.seek(start)
                file.write(content[start : start + block])
        file.truncate(len(content))


def cut_again_and_again(learner: Learner, image: Path, count: int, told: list[int], folder: Path) -> list[Cut]:
    """The moments; halfway the e-stop is pressed, and the power goes as soon as that is written."""
    chance, cuts, stop = random.Random(SEED), [], EmergencyStop(learner.run / "estop")
    for number in range(count):
        time.sleep(chance.uniform(0.02, 0.5))
        if number == count // 2:
            stop.press("the test")
            until(lambda: stop.reason().startswith("the test at "), 20, "the press is written")
        latched = stop.reason() is not None
        acknowledged, highest = learner.acknowledged_items(), max(told, default=0)
        with learner.stopped():
            content = content_of_disk(image)
        copy = folder / f"cut_{number:02d}.img"
        write_sparse(copy, content)
        cuts.append(Cut(copy, acknowledged, highest, latched))
    stop.close()
    return cuts


@contextmanager
def mounted(image: Path, folder: Path):
    folder.mkdir(exist_ok=True)
    command("mount", "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        command("umount", "-l", folder)


def look(cut: Cut, root: Path) -> dict[str, Any]:
    """Open every role on what is left, as a start would."""
    settings = GatewaySettings.of({**OmegaConf.to_container(read_config(root / "config.yaml")), "port": 0,
                                   "broadcast_port": 0})  # fmt: skip
    gateway = Gateway(settings, RunPaths(root))
    gateway.stop()
    gateway.run()
    held = {(item.boot_id, item.seq) for item in journal_items(root, SPEC)}
    trainer = build_trainer(read_config(root / "config.yaml"), RunPaths(root), None)
    if not trainer.publisher.newest_can_be_served():
        trainer.publisher.publish()
    trainer.step_log.close()
    exporter = Exporter(root, SPEC, ExporterOptions(), video=False)
    exporter.poll(flush=True)
    exporter.close()
    estop = EmergencyStop(root / "estop")
    estop.close()
    return {
        "lost": len(cut.acknowledged - held),
        "told": cut.told,
        "found": gateway.params.version or 0,
        "numbers_on": trainer.publisher.version,
        "step": trainer.learner.step_count,
        "latched": estop.reason() is not None,
    }


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
def test_power_cuts(disk, tmp_path, figures, count):
    image, folder = disk
    (tmp_path / "robot").mkdir()
    (folder / "run").mkdir()
    learner = Learner(folder / "run", tmp_path / "robot")
    try:
        learner.start()
        with listener(learner.ports) as told:
            until(lambda: max(told, default=0) >= 2, 120, f"the trainer publishes; {learner.logs()}")
            cuts = cut_again_and_again(learner, image, count, told, tmp_path)
    finally:
        learner.close()
    rows = []
    for cut in cuts:
        with mounted(cut.image, tmp_path / "after") as after:
            rows.append(look(cut, after / "run"))
        cut.image.unlink()
    wrong = {number: row for number, row in enumerate(rows)
             if row["lost"] or row["found"] < row["told"] or row["numbers_on"] < row["told"]
             or row["latched"] != cuts[number].latched}  # fmt: skip
    figures.row(
        "power_cut", "0 acknowledged lost, no version below the told one, the e-stop as it was, every start works",
        not wrong, cuts=count, starts=len(rows), lost=sum(row["lost"] for row in rows),
        acknowledged_at_the_last=len(cuts[-1].acknowledged), version_told_at_the_last=cuts[-1].told,
        step_at_the_last=rows[-1]["step"], latched_cuts=sum(cut.latched for cut in cuts),
    )  # fmt: skip
    assert not wrong, wrong
    assert cuts[-1].acknowledged, "nothing was acknowledged"
