"""The learner: prepare the run folder, start the roles, watch over them. Called by examples/train_rlpd.py learner=true.

One process per role (gateway, policy server, exporter, trainer), one supervisor; this process stays free of torch.
"""

import signal
import sys

from omegaconf import DictConfig

from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import note_start
from serl_launcher.supervisor.demos import import_demos
from serl_launcher.supervisor.launch import is_follower
from serl_launcher.supervisor.noted import start_act
from serl_launcher.supervisor.roles import roles_for
from serl_launcher.supervisor.run_folder import RunError, RunFolder, prepare
from serl_launcher.supervisor.supervisor import DONE, GAVE_UP, USER_MISTAKE, Supervisor
from serl_launcher.telemetry.journal_page import JournalPage
from serl_launcher.telemetry.registry import update
from serl_transport.security.auth import is_loopback

INTERRUPTED = 128 + signal.SIGINT


def main(cfg: DictConfig) -> int:
    """Run a learner from a resolved config.

    Returns the process's exit code: 0 done, 2 a mistake of the user (told on stderr), 3 gave up, 128 + signal.
    """
    try:
        folder = prepare(cfg)
    except RunError as error:
        print(f"learner: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:  # while it waits for a port; later the supervisor handles signals
        print("learner: interrupted before anything was started", file=sys.stderr)
        return INTERRUPTED
    with folder.lock:
        if folder.state == "complete":
            print(
                f"run {cfg.run} is complete: {folder.paths.summary}\n"
                "Start a new one with run=<new name>, or on_complete=rotate to move this one aside."
            )
            return DONE
        if is_follower(cfg):
            return follow(cfg, folder)
        if not is_loopback(cfg.bind_host) and not cfg.security.keys_dir:
            print(f"warning: insecure=true, anyone who reaches {cfg.bind_host}:{cfg.port} may send data and drive")
        if warning := unreachable_from_elsewhere(cfg):
            print(warning)
        print(f"{folder.state} run {folder.paths.root}, ports {cfg.port} and {cfg.broadcast_port}", flush=True)
        if folder.console:
            print(f"console: {folder.console}", flush=True)
        try:
            for line in start_act(folder.paths, cfg):
                print(f"  {line}", flush=True)
        except OSError as error:
            print(f"learner: {folder.paths.acts} cannot be written: {error.strerror}", file=sys.stderr)
            return USER_MISTAKE
        try:
            if cfg.demos and (code := import_demos(folder.paths)):
                return code
        except KeyboardInterrupt:
            print("learner: interrupted while demonstrations were imported; the next start goes on", file=sys.stderr)
            return INTERRUPTED
        return supervise(cfg, folder)


def follow(cfg: DictConfig, folder: RunFolder) -> int:
    """The part of a machine beyond the first: what people do and what is imported is the first one's."""
    launch = cfg.launch
    print(
        f"{folder.state} run {folder.paths.root}, machine {launch.machine_rank} of {launch.num_machines} (from 0): "
        f"follows the gateway at {launch.main_host}:{cfg.port}",
        flush=True,
    )
    return supervise(cfg, folder)


def supervise(cfg: DictConfig, folder: RunFolder) -> int:
    """Write the start down, keep the roles alive to the end, write the end down; the exit code."""
    try:
        page = note(folder)
    except OSError as error:
        print(f"learner: {folder.paths.root} takes no record of this start: {error}", file=sys.stderr)
        return USER_MISTAKE
    supervisor = Supervisor(
        folder.paths,
        roles_for(cfg, folder.paths, folder.stages),
        dashboard_period_s=cfg.telemetry.dashboard_period_s,
        ends=bool(folder.stages),
        console=folder.console,
        page=page,
        follows=is_follower(cfg),
    )
    code = supervisor.run()
    page.end(how_it_ended(code))
    _update_index(folder.paths)
    return code


def note(folder: RunFolder) -> JournalPage:
    """This start in the run's record, on its page and in the index of runs. OSError when the disk refuses."""
    note_start(folder.paths, "learner", sys.argv[1:], folder.state)
    page = JournalPage(folder.paths, lambda text: print(text, flush=True))
    page.start()
    update(folder.paths.root)
    return page


def how_it_ended(code: int) -> str:
    """An exit code in words, for the run's page."""
    known = {DONE: "complete", USER_MISTAKE: "a mistake that a person must mend", GAVE_UP: "gave up"}
    return known.get(code) or f"stopped by {signal.Signals(code - 128).name}"


def _update_index(paths: RunPaths) -> None:
    """The run's row, as it ended; the index can be made again at any time."""
    try:
        update(paths.root)
    except OSError as error:
        print(f"the index of runs was not updated ({error}); tools/runs.py list makes it anew", flush=True)


def unreachable_from_elsewhere(cfg: DictConfig) -> str | None:
    """One line where keys or insecure=true suggest a robot on another host that could not connect; else None."""
    if not is_loopback(cfg.bind_host) or not (cfg.security.keys_dir or cfg.insecure):
        return None
    named = f"security.keys_dir={cfg.security.keys_dir}" if cfg.security.keys_dir else "insecure=true"
    return (
        f"warning: {named} but bind_host={cfg.bind_host}: a robot on another host cannot connect; "
        "bind_host=0.0.0.0 lets it"
    )
