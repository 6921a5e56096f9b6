"""Weights & Biases in a process of its own, so that nothing that W&B does or waits for can hold training up.

    trainer ─▶ WandbProcess.write ─▶ [socket; what does not fit is dropped] ─▶ this module as a process ─▶ wandb

Called by telemetry.metrics. The process bounds itself with SIGALRM, which ends it wherever it hangs: START_S for the
start, FINISH_S for the end. It ends when the trainer does, however that ends. W&B never gets the config's secrets.
"""

import contextlib
import json
import logging
import os
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

_log = logging.getLogger(__name__)
START_S, FINISH_S = 20, 20
CLOSE_S = 8.0  # less than a trainer has when its launcher ends
_MESSAGE_BYTES = 1 << 20


class WandbProcess:
    """The trainer's end. folder: metrics/ of the run; name, project: in W&B; config: of the run, plain containers.

    `write` raises OSError once W&B is gone; the message says why.
    """

    def __init__(self, folder: Path, name: str, project: str, config: Mapping[str, Any]) -> None:
        self._folder = folder
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(folder), name, project],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a signal to the trainer's group must not end it before it has finished
            )
        ours.setblocking(False)
        self._socket = ours
        self._dropped = 0
        ours.send(json.dumps(without_secrets(config), default=str).encode())

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One step's metrics."""
        try:
            self._socket.send(json.dumps({"trainer/step": step, **numbers}).encode())
        except BlockingIOError:
            self._dropped += 1
            if self._dropped == 1:
                _log.warning(
                    "telemetry.wandb: W&B takes no rows just now; from step %d on some are missing there", step
                )
        except OSError:
            raise OSError(self._why()) from None

    def close(self) -> None:
        """Let it finish. What takes longer than CLOSE_S is not waited for: it goes on by itself, up to its alarm."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(CLOSE_S) == 0:
                return
        _log.warning("telemetry.wandb: %s", self._why())

    def _why(self) -> str:
        code = self._process.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(0.5)
        silent = "W&B could not be reached or does not answer"
        what = {None: f"{silent}; it is not waited for any longer", -signal.SIGALRM: silent}.get(code, "W&B has failed")
        return f"{what}; the metrics are in {self._folder}, what W&B took is in wandb/ there (`wandb sync`)"


def main(descriptor: int, folder: Path, name: str, project: str) -> int:
    """The process: rows from the socket until its other end is closed."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as rows:
        config = json.loads(rows.recv(_MESSAGE_BYTES))
        signal.alarm(START_S)
        run = _start(folder, name, project, config)
        signal.alarm(0)
        while message := rows.recv(_MESSAGE_BYTES):
            run.log(json.loads(message))
        signal.alarm(FINISH_S)
        run.finish()
    return 0


def _start(folder: Path, name: str, project: str, config: Mapping[str, Any]) -> Any:
    """A W&B run that resumes under the same id; offline unless a key (or WANDB_MODE) says otherwise."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    id_path = folder / "wandb_run_id"
    if not id_path.exists():
        write_text(id_path, uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project,
        name=name,
        id=id_path.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        mode=mode,  # type: ignore[arg-type]
        config=dict(config),
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False
        ),  # a remote's address may hold a token
    )
    run.define_metric("trainer/step")
    run.define_metric("*", step_metric="trainer/step")
    if mode == "offline":
        print(f"W&B is offline (no WANDB_API_KEY): `wandb sync {folder}/wandb/offline-run-*` uploads it", flush=True)
    return run


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
