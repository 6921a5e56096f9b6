"""One actor process: built from a resolved config, run, and emptied. Called by examples/train_rlpd.py; torch-free.

    main(cfg) ─▶ environment, guard, link to the learner, actor ─▶ actor.run() ─▶ flush the spool ─▶ exit code

User mistakes end here as one line: expected, got, and the key to change.
"""

import faulthandler
import json
import logging
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from serl_config.mistakes import mistake_message
from serl_robot_infra.calls import PartFailedError
from serl_robot_infra.connect import StoppedError, connect_learner, flush, leave, standalone
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.observers.call_watch import watching_calls
from serl_robot_infra.observers.learner_watch import watching
from serl_robot_infra.pacing import StopSignal
from serl_robot_infra.safety import describe
from serl_robot_infra.task_yaml import check_task
from serl_robot_infra.wiring import (
    build_actor,
    build_env,
    build_guard,
    describe_guard,
    listen_for_estop,
    plain,
    restart_s,
)
from serl_transport.client import TrainerClient
from serl_transport.contract.errors import Refused, SpoolError, WireError
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 130
_MISTAKES = (InstantiationException, ValueError, ImportError, WireError, SpoolError, OSError, OmegaConfBaseException)


def main(cfg: DictConfig, stream: TextIO | None = None) -> int:
    """Run an actor from a resolved config; the process's exit code.

    0 done or stopped, 1 what had worked failed, 2 user mistake, 130 interrupted. Its keys: config/base.yaml.
    """
    stream = stream or sys.stdout
    stop = StopSignal()
    try:
        with stop.installed():
            _run(cfg, stream, stop)
    except _MISTAKES as mistake:
        log.debug("where it came from", exc_info=True)
        message = mistake_message(mistake) if isinstance(mistake, InstantiationException) else str(mistake)
        print(f"actor: error: {message}", file=stream, flush=True)
        return USER_MISTAKE
    except PartFailedError as fault:
        log.debug("where it came from", exc_info=True)
        print(f"actor: error: {fault}; what was not delivered is sent at the next start", file=stream, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("actor: interrupted; what was not delivered is sent at the next start", file=stream, flush=True)
        return INTERRUPTED
    except StoppedError:
        pass
    return INTERRUPTED if stop.signal is signal.SIGINT else 0


def _run(cfg: DictConfig, stream: TextIO, stop: StopSignal) -> None:
    check_task(plain(cfg.task), f"config/task/{cfg.task.get('name') or '<yours>'}.yaml")
    spec = TaskSpec.from_dict(plain(cfg.task.spec))
    with ExitStack() as resources:
        resources.callback(faulthandler.cancel_dump_traceback_later)  # of watching_calls: it holds until here
        env = build_env(cfg, spec)
        resources.callback(_close, env, stream)
        renderer = getattr(env, "renderer_name", "none")
        learner = f"{cfg.ip}:{cfg.port}" if cfg.ip else "none"
        print(f"task {spec.name}, renderer {renderer}, learner {learner}", file=stream, flush=True)
        _record_code(cfg, stream)
        print(describe(plain(cfg.task.get("safety")), spec.targets), file=stream, flush=True)
        estop = EmergencyStop(Path(cfg.runs_dir) / cfg.run / "estop", cfg.unique_identifier)
        resources.callback(estop.close)
        listen_for_estop(cfg, estop, stream)
        parts = resources.enter_context(ExitStack())  # of people; the guard is closed before them
        guard = build_guard(cfg, env, estop)
        resources.callback(guard.close)
        resources.enter_context(guard.installed())
        print(describe_guard(guard, env), file=stream, flush=True)
        link = connect_learner(cfg, spec, stream, stop) if cfg.ip else standalone(cfg)
        resources.callback(link.stop)
        actor, observer, sender = build_actor(cfg, env, link, stream, stop, guard)
        resources.callback(sender.close)
        stack = actor.runner.stack
        for part in (stack.reward, stack.operator):
            parts.callback(_close, part, stream)
        resources.enter_context(watching_calls(stack.calls, guard, observer, stack.adder.rescue, restart_s(cfg)))
        if isinstance(link, TrainerClient):
            resources.enter_context(watching(link, observer.message))
        try:
            ended = actor.run()
        except Refused:  # another process has this actor's name now: what was recorded is still taken
            flush(link, cfg.rollout.flush_timeout_s, observer)
            raise
        except Exception as fault:
            leave(link, str(fault))
            if isinstance(fault, OSError | SpoolError):  # it worked until now: nothing that a person typed
                raise PartFailedError(f"{type(fault).__name__}: {fault}") from fault
            raise
        observer.message(ended)
        flush(link, cfg.rollout.flush_timeout_s, observer)
        leave(link, ended)
        observer.close()


def _close(part: object, stream: TextIO) -> None:
    """Let go of a device. One that fails at it is told, and makes no mistake of the user of how the run ended."""
    try:
        getattr(part, "close", lambda: None)()
    except Exception as fault:
        log.debug("where it came from", exc_info=True)
        told = f"{type(part).__name__}.close failed: {type(fault).__name__}: {' '.join(str(fault).split())}"
        print(f"actor: {told}", file=stream, flush=True)


def _record_code(cfg: DictConfig, stream: TextIO) -> None:
    """Which code a lab's own package is (--config-dir), on the screen and in `code/<unique_identifier>.json`."""
    code = plain(cfg.get("code"))
    if not code:
        return
    folder = Path(cfg.runs_dir) / cfg.run / "code"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cfg.unique_identifier}.json").write_text(json.dumps(code, indent=2) + "\n")
    for name, told in code["packages"].items():
        parts = ", ".join(f"{key} {value}" for key, value in told.items() if value)
        print(f"code: {name} ({parts})", file=stream, flush=True)
