"""Weights & Biases in a process of its own, so that nothing that W&B does or waits for can hold training up.

    trainer, train_sft ─▶ WandbProcess ─ a socket: the config; open until it ends ─▶ this module as a process ─▶ wandb
                      └─▶ metrics/trainer.jsonl and the rest of the run folder ─▶ telemetry.wandb_folder ─┘

Called by telemetry.metrics. The process bounds itself with SIGALRM, which ends it wherever it hangs: START_S for the
start, STUCK_S for a look at the folder, FINISH_S for the end (UPLOAD_S where there is a policy to upload). It ends when
the trainer does, however that ends. W&B never gets the config's secrets.
"""

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serl_config.secrets import without_secrets
from serl_launcher.run.files import write_text
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.revision import ROOT
from serl_launcher.telemetry.wandb_folder import WatchedFolder

_log = logging.getLogger(__name__)
START_S, STUCK_S, FINISH_S, UPLOAD_S = 60, 600, 20, 1800
CLOSE_S = 8.0  # less than a trainer has when its launcher ends
LOOK_S = 1.0  # between two looks at the run folder
_MESSAGE_BYTES = 1 << 20
_DONE = b"done"  # said before the socket is closed: the trainer was not killed


class WandbProcess:
    """The trainer's end. root: the run folder; config: of the run, plain containers.

    `write` raises OSError once W&B is gone; the message says why.
    """

    def __init__(self, root: Path, config: Mapping[str, Any]) -> None:
        self._metrics = RunPaths(root).metrics
        self._metrics.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(root)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a signal to the trainer's group must not end it before it has finished
            )
        self._socket = ours
        ours.send(json.dumps(without_secrets(config), default=str).encode())

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """A row was written to trainer.jsonl, where the process finds it."""
        if self._process.poll() is not None:
            raise OSError(self._why())

    def close(self) -> None:
        """Let it finish. What takes longer than CLOSE_S is not waited for: it goes on by itself, up to its alarm."""
        with contextlib.suppress(OSError):  # it has ended
            self._socket.send(_DONE)
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(CLOSE_S) == 0:
                return
        _log.warning("telemetry.wandb: %s", self._why())

    def _why(self) -> str:
        code = self._process.poll()
        silent = "W&B could not be reached or does not answer"
        going_on = f"W&B takes longer than {CLOSE_S:g} s; it is not waited for any longer and goes on by itself"
        what = {None: going_on, -signal.SIGALRM: silent}.get(code, "W&B has failed")
        return f"{what}; the metrics are in {self._metrics}, what W&B took is in wandb/ there (`wandb sync`)"


def main(descriptor: int, root: Path) -> int:
    """The process: looks at the run folder until the other end of the socket is closed."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as trainer:
        config = json.loads(trainer.recv(_MESSAGE_BYTES))
        signal.alarm(START_S)
        run = _start(RunPaths(root), config)
        folder = WatchedFolder(run, RunPaths(root), config)
        said = b""
        while True:
            over = bool(select.select([trainer], [], [], LOOK_S)[0])
            if over:
                said = trainer.recv(_MESSAGE_BYTES)
            signal.alarm(STUCK_S)
            folder.look(over)
            signal.alarm(0)
            if over:
                break
    signal.alarm(UPLOAD_S if folder.uploads else FINISH_S)
    run.finish(exit_code=0 if said == _DONE else 1)
    return 0


def _start(paths: RunPaths, config: Mapping[str, Any]) -> Any:
    """A W&B run that resumes under the same id; the config's telemetry.* before WANDB_* of the environment and .env."""
    read_env(os.environ)
    import wandb

    telemetry = config.get("telemetry") or {}
    mode, why = _mode(wandb.setup().settings)
    os.environ.setdefault("WANDB_DATA_DIR", str(paths.metrics / "wandb"))  # where policies wait for their upload
    id_path = paths.metrics / "wandb_run_id"
    if not id_path.exists():
        write_text(id_path, os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:12])
    run = wandb.init(
        entity=telemetry.get("entity"),
        project=telemetry.get("project") or os.environ.get("WANDB_PROJECT") or "flowserl",
        group=telemetry.get("group"),
        tags=telemetry.get("tags") or None,
        name=os.environ.get("WANDB_NAME") or paths.root.name,
        id=id_path.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(paths.metrics),
        mode=mode,  # type: ignore[arg-type]
        config=dict(config),
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False
        ),  # a remote's address may hold a token
    )
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="trainer/step")
    if mode == "offline":
        print(f"W&B is offline ({why}): `wandb sync {paths.metrics}/wandb/offline-run-*` uploads it", flush=True)
    return run


def _mode(settings: Any) -> tuple[str, str]:
    """online or offline, and why: as WANDB_MODE or `wandb offline` says, else by whether there is a key."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"], "WANDB_MODE"
    if settings.mode != "online":
        return settings.mode, "as `wandb offline` set it"
    from requests.utils import get_netrc_auth  # where `wandb login` leaves the key

    keys = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
    if any(os.environ.get(key) for key in keys) or get_netrc_auth(settings.base_url):
        return "online", "a key was found"
    return "offline", "no WANDB_API_KEY in the environment or .env, no `wandb login`"


def read_env(environment: Any) -> None:
    """WANDB_* of `.env` in the current folder, then beside README.md; what the environment says already wins."""
    for path in dict.fromkeys((Path.cwd() / ".env", ROOT / ".env")):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            key, equals, value = line.strip().removeprefix("export ").partition("=")
            if equals and key.strip().startswith("WANDB_") and (word := value.strip().strip("\"'")):
                environment.setdefault(key.strip(), word)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
