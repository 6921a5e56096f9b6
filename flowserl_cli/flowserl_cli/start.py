"""start.sh behind the bootstrap: run actor and learner side by side on this machine until the learner is done.

    start.sh [--no-tmux] [--stop] [overrides]

    terminal and tmux:   start ─▶ tmux server of our own ─▶ pane: start --side actor ───▶ train_rlpd.py
                            ▲ exit files                 └▶ pane: start --side learner ─▶ train_rlpd.py
    otherwise:           start ─▶ both train_rlpd.py, lines prefixed [actor] and [learner]

A side that crashes is started again; one that ends with a mistake of the user ends everything. Exit code 0 only when
the learner completed the run and summary.json is there.
"""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowserl_cli.registry import Registry
from flowserl_cli.sides import USER_MISTAKE, Side, Stopper, keep
from flowserl_cli.tmux import Panes

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path.cwd()  # start.sh has gone to the checkout: runs/ and relative paths are its
USAGE = """start.sh [--no-tmux] [--stop] [--config-dir FOLDER] [overrides]
  (nothing)    the quick start: actor and learner on this machine, in two tmux panes when there is a terminal
  --no-tmux    both in this terminal, lines prefixed [actor] and [learner]
  --stop       end everything that start.sh started from this checkout (one run of it: --stop run=<name>)
  --config-dir FOLDER   groups and a package of your own, outside this checkout (docs/your_lab.md)
  overrides    any key of config/base.yaml, such as  run=night1 seed=3 task=pick_gym_hil schedule.stages.3.steps=4000
A run that was interrupted goes on where it was; a finished one of the same name is moved aside."""
ACTOR_GOODBYE_S = 30.0  # the learner's schedule has told the actor to stop; it delivers what it holds


def main(argv: Sequence[str]) -> int:
    """Run, stop or keep one side; returns the exit code."""
    registry = Registry(ROOT)
    if argv[:1] == ["--side"]:  # internal: what a pane runs, `--side NAME RUN_DIR overrides...`
        return keep_side(argv[1], argv[3:], Path(argv[2]), registry)
    from flowserl_cli.lab import joined

    try:
        argv = joined(argv)
    except ValueError as error:
        return mistake(str(error))
    flags = {word for word in argv if word == "-h" or (word.startswith("--") and "=" not in word)}
    overrides = [word for word in argv if word not in flags]
    if {"-h", "--help"} & flags:
        print(USAGE)
        return 0
    if unknown := flags - {"--no-tmux", "--stop"}:
        return mistake(f"unknown flag {min(unknown)!r}\n{USAGE}")
    if flags >= {"--stop"} and not overrides:
        return stop(registry, None)
    if sides := [word for word in overrides if word.startswith(("actor=", "learner="))]:
        return mistake(f"start.sh runs both sides; drop {sides[0]!r} or use run_actor.sh or run_learner.sh")
    # Hydra only now: --stop and a pane do without it.
    from flowserl_cli.compose import ConfigError, load_config
    from serl_launcher.supervisor.run_folder import RunError, run_paths

    try:
        config = load_config([*overrides, "learner=true"])
        run_dir = run_paths(config).root
    except (ConfigError, RunError) as error:
        return mistake(str(error))
    if "--stop" in flags:
        return stop(registry, run_dir)
    return launch(config, overrides, run_dir, registry, "--no-tmux" in flags)


def mistake(message: str) -> int:
    """Tell the user what to change."""
    print(f"start.sh: {message}", file=sys.stderr)
    return USER_MISTAKE


def launch(config: "DictConfig", overrides: Sequence[str], run_dir: Path, registry: Registry, no_tmux: bool) -> int:
    """Run both sides to the end."""
    from serl_launcher.supervisor import run_folder

    for entry in registry.alive(run_dir):
        where = f"see it: tmux -L {entry.socket} attach; " if entry.socket else ""
        return mistake(f"run {run_dir.name} is already running (pid {entry.pid}); {where}end it: bash start.sh --stop")
    paths = run_folder.run_paths(config)
    try:
        run_folder.check_network(config)
        run_folder.check_launch(config)
        run_folder.wait_for_ports(config)  # or our actor would find the learner that holds them
        if run_folder.is_complete(paths, config):  # before the actor opens its spool in there
            print(f"the finished run {run_dir.name} was moved to {run_folder.rotate(paths)}")
    except run_folder.RunError as error:
        return mistake(str(error))
    except KeyboardInterrupt:
        print("start.sh: interrupted before anything was started", file=sys.stderr)
        return 128 + signal.SIGINT
    panes = not no_tmux and sys.stdin.isatty() and sys.stdout.isatty() and shutil.which("tmux") is not None
    if not panes and not no_tmux:
        print("no terminal or no tmux: both sides follow in this window", flush=True)
    socket = f"flowserl-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}" if panes else None
    me = registry.register("launcher", run_dir, socket)
    try:
        code = in_panes(Panes(socket), overrides, run_dir, registry) if socket else in_foreground(overrides)
    finally:
        registry.forget(me.pid)
    if code == 0 and not paths.summary.exists():
        print(f"start.sh: the learner ended without {paths.summary}", file=sys.stderr)
        return 1
    return code


def in_foreground(overrides: Sequence[str]) -> int:
    """Both sides as our children; their output becomes prefixed lines."""
    stopper = Stopper()
    actor, learner = (Side(name, overrides, ROOT, prefixed=True) for name in ("actor", "learner"))
    learner.start()
    actor.start()
    try:
        while stopper.signum is None:
            code = outcome(actor.tick(), learner.tick())
            if code is not None:
                break
            time.sleep(0.1)
        else:
            print(f"{signal.Signals(stopper.signum).name}: stopping the actor, then the learner", flush=True)
            code = 128 + stopper.signum
        if code == 0:
            _await(lambda: actor.tick() is not None, ACTOR_GOODBYE_S)
    finally:
        actor.stop()
        learner.stop()
    return code


def outcome(actor: int | None, learner: int | None) -> int | None:
    """The run's exit code from the sides' final ones; None while it goes on. A finished actor does not end the run."""
    if learner is not None:
        return learner
    return actor or None


def keep_side(name: str, overrides: Sequence[str], run_dir: Path, registry: Registry) -> int:
    """What a tmux pane runs: one side on the pane's terminal; its final code goes to a file for the launcher."""
    stopper = Stopper()
    socket = next((entry.socket for entry in registry.alive(run_dir) if entry.name == "launcher"), None)
    me = registry.register(name, run_dir, socket)
    code = 128 + signal.SIGTERM
    try:
        code = keep(Side(name, overrides, ROOT, prefixed=False), stopper)
        code = 128 + stopper.signum if stopper.signum else code
    finally:
        _exit_file(registry, run_dir, name).write_text(str(code))
        registry.forget(me.pid)
    if name == "learner" and socket and not any(e.name == "launcher" for e in registry.alive(run_dir)):
        # The launcher's terminal was closed, and nobody else would end the session.
        registry.stop(run_dir)
        Panes(socket).close()
    return code


def in_panes(panes: Panes, overrides: Sequence[str], run_dir: Path, registry: Registry) -> int:
    """Both sides in tmux; we wait for their exit files while the terminal shows the session."""
    stopper = Stopper()
    for name in ("actor", "learner"):
        _exit_file(registry, run_dir, name).unlink(missing_ok=True)
    command = (sys.executable, "-m", "flowserl_cli.start", "--side")
    panes.close()  # a left-over server of a launcher that was killed
    panes.open({name: [*command, name, str(run_dir), *overrides] for name in ("actor", "learner")}, ROOT)
    attached = panes.attach()
    detached_told = False
    try:
        while True:
            codes = {name: _final(registry, run_dir, name) for name in ("actor", "learner")}
            code = outcome(codes["actor"], codes["learner"])
            if code is None and not panes.exists():
                code = 128 + signal.SIGTERM
            if code is not None or stopper.signum is not None:
                break
            if attached.poll() is not None and not detached_told:
                detached_told = True
                see = f"tmux -L {panes.socket} attach"
                print(f"detached; the run goes on. See it: {see}. End it: Ctrl-C here, or start.sh --stop")
            time.sleep(0.2)
    except BaseException:
        _end_panes(panes, attached, run_dir, registry)
        raise
    if code is None and stopper.signum == signal.SIGHUP:  # the terminal is gone, tmux keeps the run
        attached.terminate()
        return 128 + signal.SIGHUP
    if code == 0:
        _await(lambda: _final(registry, run_dir, "actor") is not None, ACTOR_GOODBYE_S)
    _end_panes(panes, attached, run_dir, registry)
    return code if code is not None else 128 + stopper.signum


def _end_panes(panes: Panes, attached: subprocess.Popen, run_dir: Path, registry: Registry) -> None:
    """Stop the sides in order, take over what they showed last, end the session."""
    for name in ("actor", "learner"):
        registry.end([entry for entry in registry.alive(run_dir) if entry.name == name])
    last = {name: panes.text(name) for name in ("actor", "learner")} if panes.exists() else {}
    panes.close()
    attached.wait()
    for name, text in last.items():
        print(f"--- {name}, last lines\n{text}")


def _exit_file(registry: Registry, run_dir: Path, name: str) -> Path:
    return registry.folder / f"{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}.{name}.exit"


def _final(registry: Registry, run_dir: Path, name: str) -> int | None:
    try:
        return int(_exit_file(registry, run_dir, name).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _await(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def stop(registry: Registry, run_dir: Path | None) -> int:
    """`start.sh --stop`."""
    entries = list(registry.alive(run_dir))
    if not entries:
        print(
            "nothing to stop: start.sh runs nothing here" if run_dir is None else f"run {run_dir.name} is not running"
        )
        return 0
    for entry in entries:
        print(f"stopping {entry.name} of {entry.run_dir} (pid {entry.pid})", flush=True)
    registry.stop(run_dir)
    for socket in {entry.socket for entry in entries if entry.socket}:
        Panes(socket).close()
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
