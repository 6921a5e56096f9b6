"""The supervisor over small real processes: restarts, user mistakes, giving up, the order of the end, dying with it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
from history_samples import SampleRun

from serl_config.process import RestartBudget, process_stat
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor.children import Child, ChildSpec
from serl_launcher.supervisor.supervisor import Supervisor

PATIENCE_S = 30.0


def role(paths: RunPaths, name: str, code: str) -> ChildSpec:
    argv = (sys.executable, "-S", "-c", code)
    return ChildSpec(name, argv, log=paths.log(name), grace_s=5.0, starting_file=paths.starting(name))


quick = partial(RestartBudget, first_wait_s=0.01, longest_wait_s=0.02)


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path / "runs" / "demo")
    paths.logs.mkdir(parents=True)
    return paths


@pytest.fixture(autouse=True)
def quick_look(monkeypatch):
    """The roles here live for moments."""
    monkeypatch.setattr("serl_launcher.supervisor.supervisor.TICK_S", 0.01)


def run(paths, *roles, **options) -> tuple[int, str]:
    out = io.StringIO()
    code = Supervisor(paths, roles, out=out, dashboard_period_s=0.1, **options).run()
    return code, out.getvalue()


def test_a_role_that_dies_is_started_again(paths):
    # The first life is killed, the second reports a mistake, which ends the run.
    flag = paths.root / "second"
    again = (
        f"import os; first = not os.path.exists({str(flag)!r}); open({str(flag)!r}, 'w').close()\n"
        "if first: os.kill(os.getpid(), 9)\n"
        "print('port 5588: in use'); raise SystemExit(2)"
    )
    code, text = run(paths, role(paths, "gateway", again), role(paths, "policy", "import time; time.sleep(600)"))
    assert code == 2
    assert "gateway ended before it was ready (signal SIGKILL); starting it again in 0.5 s" in text
    assert "gateway started again" in text
    assert "gateway cannot run:\n    port 5588: in use" in text


def test_exit_2_stops_everything(paths):
    pid_file = paths.root / "pid"
    other = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    wait = f"import os, time\nwhile not os.path.exists({str(pid_file)!r}): time.sleep(0.01)\ntime.sleep(0.1)\n"
    code, _ = run(paths, role(paths, "policy", other), role(paths, "trainer", wait + "raise SystemExit(2)"))
    assert code == 2
    assert not process_stat(int(pid_file.read_text()))


def test_a_role_that_dies_before_it_is_ready_is_given_up_with_its_last_lines(paths):
    code, text = run(paths, role(paths, "policy", "print('no such model'); raise SystemExit(1)"), budget=quick)
    assert code == 3
    assert text.count("policy started again") == 4
    assert text.count("policy ended before it was ready (exit code 1)") == 4
    assert "policy keeps dying before it is ready (exit code 1); giving up" in text
    assert text.rstrip().endswith("no such model")


def test_a_role_that_was_ready_comes_back_however_often_it_is_killed(paths):
    # It comes up, is killed seven times, and reports a mistake in its eighth life, which ends the run.
    lives = paths.root / "lives"
    code = (
        "import os, signal\n"
        "os.unlink(os.environ['FLOWSERL_STARTING_FILE'])\n"
        f"open({str(lives)!r}, 'a').write('x')\n"
        f"if os.path.getsize({str(lives)!r}) < 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "raise SystemExit(2)"
    )
    code, text = run(paths, role(paths, "policy", code), budget=quick)
    assert code == 2
    assert lives.read_text() == "x" * 8
    assert text.count("policy started again") == 7
    assert "policy ended (signal SIGKILL), for the 7th time in quick succession; starting it again in 0.02 s" in text


def test_one_life_in_which_it_was_ready_renews_the_patience(paths):
    lives = paths.root / "lives"
    code = (
        "import os\n"
        f"open({str(lives)!r}, 'a').write('x')\n"
        f"if os.path.getsize({str(lives)!r}) == 4: os.unlink(os.environ['FLOWSERL_STARTING_FILE'])\n"
        "raise SystemExit(1)"
    )
    assert run(paths, role(paths, "policy", code), budget=quick)[0] == 3
    assert len(lives.read_text()) == 4 + 5


BEATING = """
import os, sys, time
from serl_launcher.run.ready import say_ready
lives = {lives!r}
open(lives, 'a').write('x')
say_ready()
if os.path.getsize(lives) == 1:
    time.sleep(600)
raise SystemExit(2)
"""


def test_a_role_that_hangs_is_killed_with_its_stack_in_the_log_and_started_again(paths, monkeypatch):
    monkeypatch.setattr("serl_launcher.supervisor.supervisor.LOOK_S", 0.1)
    monkeypatch.setattr("serl_launcher.supervisor.pulse.NOTICED_S", 0.3)
    monkeypatch.setattr("serl_launcher.supervisor.pulse.STUCK_S", 0.6)
    code = BEATING.format(lives=str(paths.root / "lives"))
    spec = replace(role(paths, "policy", code), argv=(sys.executable, "-c", code), beats=True)
    result, text = run(paths, spec, budget=quick)
    assert result == 2
    assert "policy: silent for" in text
    assert "policy is killed (silent for 1 s); where it hung:" in text
    assert "policy started again" in text
    assert "in <module>" in paths.log("policy").read_text()  # the stack


def mistake_after(lives, n: int) -> str:
    """A role that ends the run once the file of another role's lives is so long."""
    so_many = f"os.path.exists({str(lives)!r}) and os.path.getsize({str(lives)!r}) >= {n}"
    return f"import os, time\nwhile not ({so_many}): time.sleep(0.01)\nraise SystemExit(2)"


@pytest.mark.parametrize("end", ["raise SystemExit(1)", "raise SystemExit(2)", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("ready", [True, False])
def test_a_derived_role_never_ends_a_run_whatever_it_dies_of(paths, end, ready):
    """Twelve deaths, however early; then another role's mistake ends the run."""
    lives, up = paths.root / "lives", "os.unlink(os.environ['FLOWSERL_STARTING_FILE'])" if ready else ""
    code = f"import os\n{up}\nopen({str(lives)!r}, 'a').write('x')\nprint('no dataset'); {end}"
    exporter = replace(role(paths, "exporter", code), ends_run="never")
    result, text = run(paths, exporter, role(paths, "gateway", mistake_after(lives, 12)), budget=quick)
    assert result == 2
    assert "gateway cannot run" in text
    assert "exporter ended" in text
    assert "cannot run" not in text.split("gateway cannot run")[0]
    assert len(lives.read_text()) >= 12


@pytest.mark.parametrize(("lives_before_it_is_ready", "ends"), [(0, True), (1, False)])
def test_a_reward_server_may_end_a_run_until_it_was_up_once(paths, lives_before_it_is_ready, ends):
    lives = paths.root / "lives"
    code = (
        f"import os\nopen({str(lives)!r}, 'a').write('x')\n"
        f"if os.path.getsize({str(lives)!r}) <= {lives_before_it_is_ready}:\n"
        "    os.unlink(os.environ['FLOWSERL_STARTING_FILE']); raise SystemExit(1)\n"
        "raise SystemExit(2)"
    )
    reward = replace(role(paths, "reward", code), ends_run="until ready")
    _, text = run(paths, reward, role(paths, "gateway", mistake_after(lives, 8)), budget=quick)
    assert ("reward cannot run" in text) == ends
    assert ("gateway cannot run" in text) != ends


def test_a_role_that_cannot_be_started_is_tried_again(paths, monkeypatch):
    """A full disk, or no process to be had, when it is due: the run goes on without it until it can be."""
    starts = []
    real = Child.start

    def start(self, *words):
        starts.append(self.spec.name)
        if 2 <= len(starts) <= 4:
            raise OSError(28, "No space left on device")
        return real(self, *words)

    monkeypatch.setattr(Child, "start", start)
    flag = paths.root / "second"
    code = (
        f"import os; first = not os.path.exists({str(flag)!r}); open({str(flag)!r}, 'w').close()\n"
        "raise SystemExit(1 if first else 2)"
    )
    result, text = run(paths, role(paths, "gateway", code), budget=quick)
    assert (result, len(starts)) == (2, 5)
    assert text.count("gateway cannot be started ([Errno 28] No space left on device); trying again in 0.02 s") == 3


def test_old_figures_are_not_shown_as_news(paths, monkeypatch):
    monkeypatch.setattr("serl_launcher.supervisor.supervisor.LOOK_S", 0.05)
    monkeypatch.setattr("serl_launcher.telemetry.dashboard.LATE_S", 0.5)
    status = {"run": "demo", "time": 1.0, "stage": {"index": 0, "name": "demos", "mode": "demo"}, "counts": {}}
    paths.status.write_text(json.dumps(status))
    code, text = run(paths, role(paths, "gateway", "import time; time.sleep(2); raise SystemExit(2)"))
    assert code == 2
    assert "demos" in text.split("gateway silent")[0]
    assert "demo  gateway silent for 1 s, since " in text
    assert "demos" not in text.split("gateway silent", 1)[1]


DRIVER = """
import sys
from pathlib import Path
from serl_launcher.supervisor.children import ChildSpec
from serl_launcher.supervisor.supervisor import Supervisor
from serl_launcher.run.paths import RunPaths
paths = RunPaths(Path(sys.argv[1]))
code = '''
import os, signal, sys, time
name, root = sys.argv[1:]
def end(*_):
    time.sleep(0.1)
    with open(root + "/order", "a") as order:
        order.write(name + " ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open(root + "/" + name + ".pid", "w").write(str(os.getpid()))
time.sleep(600)
'''
names = ("gateway", "policy", "exporter", "trainer")
specs = [ChildSpec(n, (sys.executable, "-S", "-c", code, n, sys.argv[1]), log=paths.log(n)) for n in names]
sys.exit(Supervisor(paths, specs).run())
"""


@pytest.fixture
def driver(paths):
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(paths.root)], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def role_pids(paths) -> dict[str, int]:
    deadline = time.monotonic() + PATIENCE_S
    pids = {}
    while len(pids) < 4 and time.monotonic() < deadline:
        pids = {p.stem: int(p.read_text()) for p in paths.root.glob("*.pid") if p.read_text()}
        time.sleep(0.02)
    assert len(pids) == 4
    return pids


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_roles_in_order(paths, driver, signum):
    pids = role_pids(paths)
    driver.send_signal(signum)
    assert driver.wait(PATIENCE_S) == 128 + signum
    assert (paths.root / "order").read_text().split() == ["trainer", "policy", "gateway", "exporter"]
    assert not any(map(process_stat, pids.values()))


def test_the_roles_die_with_a_killed_supervisor(paths, driver):
    pids = role_pids(paths)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids.values()):
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids.values())


def test_a_killed_role_comes_back_under_a_new_pid(paths, driver):
    pids = role_pids(paths)
    (paths.root / "policy.pid").unlink()
    os.kill(pids["policy"], signal.SIGKILL)
    assert role_pids(paths)["policy"] != pids["policy"]
    assert all(_alive(pids[name]) for name in ("gateway", "exporter", "trainer"))


def _alive(pid: int) -> bool:
    fields = process_stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def writing(paths, *documents: dict, pause_s: float = 0.0) -> str:
    """Code of a role that writes these status documents, one after the other, and stays."""
    lines = [f"open({str(paths.status)!r}, 'w').write({json.dumps(json.dumps(body))}); time.sleep({pause_s})"
             for body in documents]  # fmt: skip
    return "\n".join(["import time", *lines, "time.sleep(600)"])


def ending(waits_for: dict, given_up: dict) -> dict:
    counts = {"stage": {"index": 0, "name": "demos", "mode": "demo"}, "counts": {}}
    return {"run": "demo", "done": True, "ending": {"waits_for": waits_for, "given_up": given_up}} | counts


def test_done_ends_the_run_with_a_summary_once_no_actor_is_waited_for(paths, monkeypatch):
    from omegaconf import OmegaConf

    from flowserl_cli.compose import load_config

    monkeypatch.setattr("serl_launcher.supervisor.supervisor.FINISHED_WAIT_S", 1.2)
    paths.config.write_text(OmegaConf.to_yaml(load_config([]), resolve=True))
    documents = [ending({"b": "makes its last episode"}, {}), ending({}, {"c": "silent for 30 s"})]
    gateway = role(paths, "gateway", writing(paths, *documents, pause_s=2.0))
    sees_the_end = f"import os, time\nwhile not os.path.exists({str(paths.status)!r}): time.sleep(0.01)"
    result, text = run(paths, gateway, role(paths, "trainer", sees_the_end), budget=quick)
    assert result == 0
    waiting = text.index("every stage is done; waiting for actor b: it makes its last episode (Ctrl-C: do not wait)")
    given_up = text.index("actor c is not waited for any longer: silent for 30 s; what it holds stays in its spool")
    assert waiting < given_up < text.index("run demo is complete")
    assert "trainer started again" not in text  # it saw the end a moment before the supervisor
    assert json.loads(paths.summary.read_text())["episodes"] == 0
    assert str(paths.learning_curve) in text


def test_a_learner_that_served_evaluations_sums_them_up_when_it_is_stopped(paths):
    sample = SampleRun(paths.root, [])
    for index in range(3):
        sample.episode("eval", "adhoc_eval", 1_000_000 + index, index > 0)
    sample.save()
    stops = "import os, time; time.sleep(0.3); os.kill(os.getppid(), 15); time.sleep(600)"
    paths.status.write_text('{"done": true, "eval": {"adhoc_eval": {}}, "stage": {}, "counts": {}, "run": "demo"}')
    code, text = run(paths, role(paths, "gateway", stops), ends=False)
    assert code == 128 + signal.SIGTERM
    assert "run demo was stopped; its evaluations so far\n" in text
    summary = json.loads(paths.summary.read_text())
    assert (summary["success_rate_from"], summary["success_rate_episodes"]) == ("adhoc_eval", 3)


def test_a_schedule_without_stages_serves_until_it_is_stopped(paths):
    paths.status.write_text('{"done": true}')
    # The status is read at once, before the role can end.
    code, text = run(paths, role(paths, "gateway", "import time; time.sleep(0.2); raise SystemExit(2)"), ends=False)
    assert code == 2
    assert "every stage is done" not in text


def test_ctrl_c_ends_the_wait_for_the_last_episodes(paths):
    status = ending({"b": "makes its last episode"}, {})
    stopper = f"import os, signal, time; time.sleep(1.2); os.kill({os.getpid()}, signal.SIGINT); time.sleep(600)"
    code, text = run(paths, role(paths, "gateway", writing(paths, status)), role(paths, "policy", stopper))
    assert code == 130
    assert "SIGINT: not waiting for b, stopping the roles (once more: at once)" in text


def test_the_consoles_address_stays_on_a_terminal_and_is_no_part_of_a_log(paths):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    paths.status.write_text('{"run": "demo"}')
    for out, shown in ((Terminal(), ["  console    http://127.0.0.1:5592/?t=word"]), (io.StringIO(), [])):
        supervisor = Supervisor(paths, [], out=out, console="http://127.0.0.1:5592/?t=word")
        supervisor._status.look(1.0)
        assert [line for line in supervisor._lines({}) if "console" in line] == shown
