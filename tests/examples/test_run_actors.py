"""run_actors.sh: names of many actors, what other hosts are told, and real actors kept alive side by side."""

import shlex
import subprocess

import pytest

from flowserl_cli.actors import Asked, commands, named, names


def run(repo_root, *words, timeout=60):
    command = ["bash", str(repo_root / "run_actors.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_each_actor_has_a_name_of_its_own(repo_root):
    done = run(repo_root, "3", "--dry-run", "ip=gpu-box", "unique_identifier=sim")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    found = [word for line in lines for word in line if word.startswith("unique_identifier=")][1::2]
    assert len(set(found)) == 3
    assert all(line[:5] == ["bash", "run_actor.sh", "task=pick", "run=pick", "ip=gpu-box"] for line in lines)
    assert names([], 2, "lab@sim1.lan") == ["actor-sim1-lan-0", "actor-sim1-lan-1"]


def test_a_host_is_told_to_start_its_own_in_a_session_that_outlives_ours(tmp_path):
    (tmp_path / "hosts").write_text("sim1\nlab@sim2  # the one under the desk\n\n")
    asked = Asked.read(["8", "--hosts", str(tmp_path / "hosts"), "ip=gpu box", "run=night1"])
    found = commands(asked)
    assert list(found) == ["sim1", "lab@sim2"] == list(named("sim1,lab@sim2"))
    session = shlex.split(found["lab@sim2"][-1])
    assert session[:6] == ["tmux", "new-session", "-d", "-s", "flowserl-night1", "-c"]
    told = shlex.split(session[-1])
    assert told[:3] == ["bash", "run_actors.sh", "8"]
    assert told[-3:] == ["ip=gpu box", "run=night1", "unique_identifier=actor-sim2"]
    ended = Asked.read(["8", "--hosts=sim1", "--stop", "run=night1"])
    assert shlex.split(commands(ended)["sim1"][-1]) == ["tmux", "kill-session", "-t", "flowserl-night1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["many"], "expected how many actors, 1 to 256, got 'many'"),
        (["2", "--host", "a"], "unknown flag '--host'"),
        (["2", "--hosts", ","], "--hosts: expected names such as sim1,sim2, or a file with one a line, got ','"),
        (["2", "operator=keyboard"], "operator=keyboard: one person's device cannot help several actors"),
        (["2", "--stop"], "--stop: expected --hosts"),
    ],
)
def test_what_cannot_be_started_is_said(words, told):
    with pytest.raises(ValueError, match=told):
        Asked.read(words)
