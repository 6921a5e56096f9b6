"""--config-dir: the folder of docs/your_lab.md composes and runs; what cannot be used as meant is refused by name."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import train_rlpd

from flowserl_cli.compose import ConfigError, group_options, load_config, open_lab
from serl_robot_infra.operators import build_operator
from serl_robot_infra.wiring import build_env, build_reward
from serl_transport.contract.specs import TaskSpec

WORDS = ("task=my_arm", "operator=my_device", "reward=my_reward", "run=my_arm")


@pytest.fixture
def lab(repo_root, tmp_path, monkeypatch):
    """The page's folder; what a lab changes in this process is taken back."""
    page = (repo_root / "docs/your_lab.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", page, re.M | re.S):
        file = tmp_path / "my_lab" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.path", [*sys.path])
    for variable in ("PYTHONPATH", "FLOWSERL_TRUST"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    yield tmp_path / "my_lab"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def flag(lab):
    return f"--config-dir={lab / 'config'}"


def test_its_parts_are_found_built_and_recorded(lab):
    cfg = load_config([flag(lab), *WORDS, "actor=true"])
    env = build_env(cfg, TaskSpec.from_dict(cfg.task.spec))
    assert type(env).__module__ == type(build_operator(cfg, env)).__module__ == "my_lab.arm"
    assert build_reward(cfg).judge(env.step([0.6])).success
    code = cfg.code.packages.my_lab
    assert cfg.code.config_dir == str(lab / "config")
    assert (code.version, code.commit) == (None, None)
    (lab / "my_lab/arm.py").open("a").write("# changed\n")
    assert load_config([flag(lab), *WORDS]).code.packages.my_lab.digest != code.digest
    child = [sys.executable, "-c", "import my_lab; print(my_lab.__file__)"]  # as a role of the learner is started
    found = subprocess.run(child, capture_output=True, text=True, check=True, cwd="/").stdout.strip()
    assert found == str(lab / "my_lab/__init__.py")
    assert load_config([]).code is None


def test_a_commit_and_its_changes_are_recorded(lab):
    git = ["git", "-C", str(lab), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    commit = load_config([flag(lab), *WORDS]).code.packages.my_lab.commit
    assert re.fullmatch(r"[0-9a-f]{12}", commit)
    (lab / "my_lab/arm.py").open("a").write("# changed\n")
    assert load_config([flag(lab), *WORDS]).code.packages.my_lab.commit == f"{commit}+changes"


def test_its_yaml_stands_in_front_of_ours_and_ours_are_still_there(lab):
    ours = load_config(["task=pick", "operator=keyboard"])
    (lab / "config/operator/keyboard.yaml").write_text("_target_: my_lab.arm.MyDevice\n")
    config = load_config([flag(lab), "task=pick", "operator=keyboard"])
    assert config.operator._target_ == "my_lab.arm.MyDevice"
    assert config.task == ours.task
    _, found = open_lab([flag(lab)])
    assert set(group_options()["task"]) | {"my_arm"} == set(group_options(lab=found)["task"])
    assert load_config(["operator=keyboard"]).operator == ours.operator


def spoil(lab, name, text):
    file = lab / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config/reward/bad.yaml", "_target_: os.system\n", "bad.yaml: _target_: os.system is of no package"),
        ("config/task/other.yaml", "env: {_target_: other_lab.Arm}\n", r"env._target_: other_lab.*TRUST=other_lab"),
        ("config/tasks/x.yaml", "a: 1\n", r"no group is called 'tasks'; did you mean 'task'"),
        ("config/base.yaml", "a: 1\n", r"base.yaml is not read"),
        ("config/task/torn.yaml", "a: [\n", r"torn.yaml cannot be read"),
        ("types.py", "", r"types.py hides Python's own module types"),
        ("hydra/__init__.py", "", r"hides .* module hydra"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(lab, name, text, says):
    spoil(lab, name, text)
    with pytest.raises(ConfigError, match=says) as refused:
        load_config([flag(lab), *WORDS])
    assert "\n" not in str(refused.value)


def test_an_installed_package_is_named_by_the_user(lab, monkeypatch):
    spoil(lab, "config/reward/far.yaml", "_target_: fractions.Fraction\n")
    with pytest.raises(ConfigError, match="FLOWSERL_TRUST=fractions"):
        load_config([flag(lab), *WORDS])
    monkeypatch.setenv("FLOWSERL_TRUST", "fractions")
    assert set(load_config([flag(lab), *WORDS]).code.packages) == {"fractions", "my_lab"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config-dir"], "expected a folder"),
        (["--config-dir", "nowhere"], "no such folder"),
        (["--config-dir=a", "--config-dir=b"], "said twice"),
        (["--config-dir", "config"], "that is this project's own"),
    ],
)
def test_the_flag_is_checked(repo_root, monkeypatch, capsys, words, says):
    monkeypatch.chdir(repo_root)
    assert train_rlpd.main(["actor=true", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_real_processes_run_an_episode_of_it(lab, repo_root, tmp_path, free_ports):
    words = [
        *WORDS, f"runs_dir={tmp_path}", f"port={free_ports[0]}", f"broadcast_port={free_ports[1]}",
        "schedule=data_collection", "schedule.stages.0.episodes=1", "telemetry.tensorboard=false",
    ]  # fmt: skip
    command = ["bash", str(repo_root / "start.sh"), "--no-tmux", "--config-dir", str(lab / "config"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | {"TMPDIR": "/tmp"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = tmp_path / "my_arm"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["episodes"], summary["successes"]) == (1, 1)
    actor = json.loads((run / "code/actor-0.json").read_text())
    assert actor == summary["code"]
    assert "code: my_lab" in done.stdout
