"""The run folder before a start: new, resumed, finished, foreign; and each mistake's one message."""

import copy
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from replay_samples import batches, entries, info, write_journal

from flowserl_cli.compose import group_options, load_config
from serl_launcher.run.files import sha256_of
from serl_launcher.run.versions import PublishedVersion, file_path, write_entry
from serl_launcher.supervisor import run_folder
from serl_launcher.supervisor.main import main, unreachable_from_elsewhere
from serl_launcher.supervisor.roles import roles_for
from serl_launcher.supervisor.run_folder import RunError, prepare

ROOT = Path(__file__).parents[3]


@cache
def composed(groups: tuple[str, ...]) -> DictConfig:
    """Hydra's work, once for each choice of groups."""
    return load_config(["learner=true", *groups])


@pytest.fixture
def compose(tmp_path, free_ports):
    """A learner's config in a folder of its own."""
    port, broadcast = free_ports

    def build(*overrides: str) -> DictConfig:
        groups = tuple(word for word in overrides if word.partition("=")[0] in group_options())
        config = copy.deepcopy(composed(groups))
        words = [f"runs_dir={tmp_path}/runs", f"port={port}", f"broadcast_port={broadcast}", *overrides]
        for word in words:
            key, _, value = word.lstrip("+").partition("=")
            if word not in groups:
                OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
        return config

    return build


def record(folder, data: bool = True) -> None:
    """A journal as the gateway begins it, and an item."""
    items = entries(batches(info("e1"))) if data else []
    write_journal(folder.paths.root, items)
    folder.lock.close()


def finish(folder) -> None:
    folder.paths.summary.write_text(json.dumps({"success_rate": 0.9}))
    folder.lock.close()


def test_a_token_that_stands_in_the_config_is_for_its_owner_alone_and_warned_of(compose, capsys):
    word = "s3cret-w0rd"
    folder = prepare(compose(f"serving.openpi_token={word}", "run=one"))
    assert folder.paths.config.stat().st_mode & 0o777 == 0o600
    assert word in folder.paths.config.read_text()
    said = capsys.readouterr().out
    assert "warning: serving.openpi_token is given as it is" in said
    assert "serving.openpi_token=env:NAME or serving.openpi_token=file:PATH" in said
    assert word not in said
    folder.lock.close()


def test_a_reference_to_a_token_stays_one(compose, capsys, tmp_path):
    path = tmp_path / "token"
    path.write_text("s3cret-w0rd")
    path.chmod(0o600)
    folder = prepare(compose("serving.openpi_port=0", f"serving.openpi_token=file:{path}", "run=one"))
    assert "s3cret-w0rd" not in folder.paths.config.read_text()
    assert OmegaConf.load(folder.paths.config).serving.openpi_token == f"file:{path}"
    assert "warning" not in capsys.readouterr().out
    folder.lock.close()
    path.chmod(0o644)
    with pytest.raises(RunError, match=r"serving.openpi_token: .* can be read by others \(mode 0644\)"):
        prepare(compose("serving.openpi_port=0", f"serving.openpi_token=file:{path}", "run=two"))
    with pytest.raises(RunError, match="the environment has no NOT_SET"):
        prepare(compose("serving.openpi_port=0", "serving.openpi_token=env:NOT_SET", "run=two"))


def test_names_made_of_a_time_never_replace_anything(tmp_path):
    """The clock was set back: the same second comes twice."""
    for name in ("summary.20261130-120000.json", "unused.20261130-120000"):
        path = tmp_path / name
        assert run_folder._unused(path) == path
        path.mkdir()
        second = run_folder._unused(path)
        assert second not in (path, *tmp_path.iterdir())
        assert second.suffix == path.suffix
        second.mkdir()
        assert not run_folder._unused(path).exists()


def test_a_new_run_gets_its_resolved_config(compose):
    folder = prepare(compose("run=one", "seed=5"))
    assert folder.state == "new"
    assert folder.paths.root.is_absolute()
    assert OmegaConf.load(folder.paths.config).seed == 5
    assert [stage.name for stage in folder.stages][:2] == ["demos", "sft"]


def test_the_same_run_is_resumed_and_its_old_status_forgotten(compose):
    folder = prepare(compose("run=one"))
    folder.paths.status.write_text('{"done": true}')
    folder.lock.close()
    assert prepare(compose("run=one", "trainer.batch_size=8")).state == "resumed"
    assert not folder.paths.status.exists()


@pytest.mark.parametrize("protection", ["security.keys_dir=keys", "insecure=true"])
def test_keys_or_insecure_on_loopback_are_warned_about(compose, protection):
    warning = unreachable_from_elsewhere(compose(protection))
    assert warning.startswith(f"warning: {protection} but bind_host=127.0.0.1")
    assert "bind_host=0.0.0.0" in warning
    assert unreachable_from_elsewhere(compose(protection, "bind_host=0.0.0.0")) is None
    assert unreachable_from_elsewhere(compose()) is None


def test_units_that_a_run_began_with_stay_its_own_where_the_next_start_does_not_name_them(compose):
    known = "{cameras: [front], state_low: [0.0], state_high: [1.0], action_low: [0.0], action_high: [1.0]}"
    record(prepare(compose("run=one", f"+policy.trained_on={known}")))
    config = compose("run=one")
    folder = prepare(config)
    folder.lock.close()
    assert folder.state == "resumed"
    assert config.policy.trained_on == OmegaConf.create(yaml.safe_load(known))


def test_an_entry_of_demos_that_is_none_is_refused_by_key(compose):
    with pytest.raises(RunError, match=r"demos\.0\.camera: unknown key; did you mean 'cameras'"):
        prepare(compose("demos=[{source: /data/lab, camera: {front: top}}]"))


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("task=pick_gym_hil", "task.name: 'pick' there, 'pick_gym_hil' now"),
        ("policy.size.width=32", "policy.size.width: 64"),
    ],
)
def test_another_experiment_is_refused_with_the_differing_keys(compose, override, shown):
    record(prepare(compose("run=one")))
    with pytest.raises(RunError, match="holds another experiment") as raised:
        prepare(compose("run=one", override))
    assert shown in str(raised.value)
    assert "run=<new name>" in str(raised.value)


@pytest.mark.parametrize("started", [False, True])
def test_a_start_that_recorded_nothing_does_not_bind_the_next_one(compose, started):
    folder = prepare(compose("run=one"))
    (folder.paths.root / "estop").touch()
    if started:
        folder.paths.params.mkdir()
        folder.paths.latest_params.write_text('{"version": 1, "step": 0}')
        record(folder, data=False)
    folder.lock.close()
    again = prepare(compose("run=one", "task.spec.max_ticks=50", "resume=never"))
    assert again.state == "new"
    assert OmegaConf.load(again.paths.config).task.spec.max_ticks == 50
    assert not again.paths.journal.exists()
    assert not again.paths.params.exists()
    assert (again.paths.root / "estop").exists()
    assert len(list(again.paths.root.glob("unused.*/journal"))) == started


def test_an_environment_s_own_keys_may_change_and_are_told(compose, capsys):
    record(prepare(compose("run=one")))
    assert prepare(compose("run=one", "task.env.renderer=egl", "+task.env.serial=42")).state == "resumed"
    said = capsys.readouterr().out
    assert "task.env.renderer: 'ray' there, 'egl' now" in said
    assert "task.env.serial: None there, 42 now" in said


def test_a_bad_task_leaves_no_folder_behind(compose):
    config = compose("run=one")
    config.task.spec.cameras = ["front"]
    with pytest.raises(RunError, match=r"config/task/pick.yaml: task spec: cameras: expected {name: "):
        prepare(config)
    assert not Path(config.runs_dir).exists()


def test_resume_never_refuses_a_used_folder(compose):
    record(prepare(compose("run=one")))
    with pytest.raises(RunError, match="resume=never"):
        prepare(compose("run=one", "resume=never"))


def test_a_finished_run_is_kept(compose, capsys):
    finish(prepare(compose("run=one")))
    assert main(compose("run=one")) == 0
    assert "run one is complete" in capsys.readouterr().out


def test_a_finished_run_is_moved_aside_on_request(compose):
    first = prepare(compose("run=one"))
    (first.paths.root / "mark").touch()
    finish(first)
    second = prepare(compose("run=one", "on_complete=rotate"))
    assert second.state == "new"
    assert not (second.paths.root / "mark").exists()
    (moved,) = second.paths.root.parent.glob("one.*")
    assert (moved / "mark").exists()
    assert (moved / "summary.json").exists()


def test_two_rotations_in_one_second_do_not_collide(compose):
    moved = []
    for _ in range(3):
        folder = prepare(compose("run=one"))
        finish(folder)
        os.utime(folder.paths.summary, (1e9, 1e9))
        moved.append(run_folder.rotate(folder.paths))
    assert len(set(moved)) == 3


def test_another_schedule_goes_on_in_the_same_folder(compose):
    finish(prepare(compose("run=one", "schedule=data_collection")))
    folder = prepare(compose("run=one", "schedule=sft"))
    assert folder.state == "resumed"
    assert not folder.paths.summary.exists()
    assert len(list(folder.paths.root.glob("summary.*.json"))) == 1


def test_a_learner_that_serves_evaluations_serves_again_though_they_were_summed_up(compose):
    finish(prepare(compose("run=one", "schedule=eval")))
    assert prepare(compose("run=one", "schedule=eval")).state == "resumed"


def evaluate(compose, *words):
    """Prepare an evaluation in run `one`, let it publish and record something; its folder."""
    folder = prepare(compose("run=one", "schedule=eval", *words))
    folder.paths.episodes.write_text("{}\n")
    publish(folder.paths.params, 1)
    folder.lock.close()
    return folder


def publish(params, version):
    params.mkdir(parents=True, exist_ok=True)
    file = file_path(params, version)
    file.write_bytes(b"parameters %d" % version)
    entry = PublishedVersion(version, 0, file.name, file.stat().st_size, sha256_of(file), 1.0)
    write_entry(params, entry)


def test_an_evaluation_of_other_parameters_is_not_one_of_those_that_the_folder_has(compose, tmp_path):
    """Two checkpoints, one after the other, in the folder that a task's scripts share: the second was of the first."""
    for name in ("a", "b"):
        publish(tmp_path / name / "params", 7)
    first = f"checkpoint_path={tmp_path / 'a'}"
    folder = evaluate(compose, first)
    assert run_folder.read_config(folder.paths).checkpoint_path == str(
        tmp_path / "a" / "params" / "v000007.safetensors"
    )
    assert evaluate(compose, first).state == "resumed"  # the same once more
    assert evaluate(compose).state == "resumed"
    with pytest.raises(RunError, match=r"checkpoint_path=.*has parameters of its own .* Take run=<new name>"):
        evaluate(compose, first)  # the start before said that the folder's own are meant


def test_a_run_that_was_trained_on_since_is_another_one_to_evaluate(compose, tmp_path):
    publish(tmp_path / "a" / "params", 7)
    evaluate(compose, f"checkpoint_path={tmp_path / 'a'}")
    publish(tmp_path / "b" / "params", 7)
    with pytest.raises(RunError, match=r"has parameters that began at .*v000007\.safetensors and would go on"):
        evaluate(compose, f"checkpoint_path={tmp_path / 'b'}")
    publish(tmp_path / "a" / "params", 8)
    with pytest.raises(RunError, match=r"v000008\.safetensors: .* Take run=<new name>"):
        evaluate(compose, f"checkpoint_path={tmp_path / 'a'}")


def test_parameters_that_evaluated_nothing_make_room_for_others(compose, tmp_path):
    for name in ("a", "b"):
        publish(tmp_path / name / "params", 7)
    folder = prepare(compose("run=one", "schedule=eval", f"checkpoint_path={tmp_path / 'a'}"))
    publish(folder.paths.params, 1)
    folder.lock.close()
    second = prepare(compose("run=one", "schedule=eval", f"checkpoint_path={tmp_path / 'b'}"))
    assert (second.state, second.paths.params.exists()) == ("new", False)


def test_a_second_learner_in_the_same_folder_is_refused(compose):
    first = prepare(compose("run=one"))
    with pytest.raises(RunError, match="another learner works in"):
        prepare(compose("run=one"))
    fcntl.flock(first.lock, fcntl.LOCK_UN)


@pytest.mark.parametrize("key", ["port", "broadcast_port"])
def test_a_port_in_use_is_named(compose, monkeypatch, key):
    monkeypatch.setattr(run_folder, "PORT_PATIENCE_S", 0.3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=rf"^{key}={port} on 127.0.0.1: address already in use"):
            prepare(compose("run=one", f"{key}={port}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["port=70000"], "port=70000: expected a port from 1 to 65535"),
        (["port=6000", "broadcast_port=6000"], "both 6000; they must differ"),
        (["bind_host=0.0.0.0"], "insecure=true"),
        (["bind_host=203.0.113.9", "insecure=true"], "cannot assign requested address"),
        (["run=a/b"], "names a folder"),
        (
            ["reward=classifier"],
            "expected reward.model=<folder that train_reward.sh wrote>, got none",
        ),
        (["run=.hidden"], "names a folder"),
        (["checkpoint_path=nowhere/to/be/found"], "checkpoint_path=nowhere/to/be/found: no such file or folder"),
        (["schedule.stages.0.mode=demonstrate"], "schedule.stages.0.mode: expected one of demo"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(compose, capsys, overrides, message):
    assert main(compose(*overrides)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unwritable_folder_is_named(compose, tmp_path):
    (tmp_path / "runs").write_text("a file is in the way")
    with pytest.raises(RunError, match=r"cannot write into .*choose another runs_dir="):
        prepare(compose("run=one"))


def test_too_little_disk_is_said_before_the_start(compose, monkeypatch):
    monkeypatch.setattr(run_folder, "MIN_FREE_MB", 1 << 40)
    with pytest.raises(RunError, match="MB are free"):
        prepare(compose("run=one"))


def test_a_broken_config_file_is_named(compose):
    folder = prepare(compose("run=one"))
    record(folder)
    folder.paths.config.write_text("a: [1")
    with pytest.raises(RunError, match=r"config\.yaml cannot be read"):
        prepare(compose("run=one"))


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ([], ["gateway", "policy", "exporter", "console", "trainer"]),
        (["schedule=data_collection"], ["gateway", "exporter", "console"]),
        (["schedule=sft", "console.port=null"], ["gateway", "exporter", "trainer"]),
        (["schedule=reject_sampling"], ["gateway", "policy", "exporter", "console", "trainer"]),
        # Nothing is published yet: the trainer publishes the first version.
        (["schedule=eval"], ["gateway", "policy", "exporter", "console", "trainer"]),
    ],
)
def test_a_schedule_starts_the_roles_that_it_needs(compose, overrides, roles):
    config = compose(*overrides)
    folder = prepare(config)
    assert [spec.name for spec in roles_for(config, folder.paths, folder.stages)] == roles


NO_TRAINER = ["gateway", "policy", "exporter", "console"]


def test_serving_published_parameters_needs_no_trainer(compose):
    config = compose("schedule=eval")
    folder = prepare(config)
    folder.paths.params.mkdir()
    path = file_path(folder.paths.params, 1)
    path.write_bytes(b"parameters")
    write_entry(folder.paths.params, PublishedVersion(1, 0, path.name, 10, sha256_of(path), 0.0))
    assert [s.name for s in roles_for(config, folder.paths, folder.stages)] == NO_TRAINER


def test_a_second_precision_beside_the_policys_is_refused_before_anything_starts(compose, capsys):
    config = compose("launch.mixed_precision=bf16")
    assert main(config) == 2
    said = capsys.readouterr().err
    assert said.startswith("learner: launch.mixed_precision=bf16: expected no: policy.precision (float32 or bfloat16) ")
    assert said.count("\n") == 1
    assert not Path(config.runs_dir, config.run).exists()


def test_ctrl_c_while_it_waits_for_its_port_is_one_line_and_exit_130(tmp_path, free_ports):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        words = ["learner=true", f"runs_dir={tmp_path}", f"port={port}", f"broadcast_port={free_ports[1]}"]
        learner = subprocess.Popen(
            [sys.executable, "examples/train_rlpd.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
        )  # fmt: skip
        lock = tmp_path / "quickstart" / ".lock"  # taken just before it waits
        while not lock.exists():
            assert learner.poll() is None
            time.sleep(0.02)
        learner.send_signal(signal.SIGINT)
        said = learner.communicate(timeout=30)[1]
    assert (learner.returncode, said) == (130, "learner: interrupted before anything was started\n")


@pytest.mark.parametrize("lost", ["segment", "journal"])
def test_a_folder_that_lost_its_journal_still_holds_data_and_nothing_of_it_is_put_aside(compose, lost):
    folder = prepare(compose())
    record(folder)
    folder.paths.episodes.write_text('{"ordinal": 0, "episode_id": "e1"}\n')
    if lost == "segment":
        (folder.paths.journal / "000001.seg").unlink()
    else:
        shutil.rmtree(folder.paths.journal)
    with pytest.raises(RunError, match="holds another experiment"):
        prepare(compose("task=pick_gym_hil"))
    assert not list(folder.paths.root.glob("unused.*"))
