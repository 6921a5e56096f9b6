"""How many trainer processes a config starts, and how they are one for the supervisor; real processes, no training."""

import copy
import json
import os
import signal
import subprocess
import sys

import pytest
from omegaconf import OmegaConf, open_dict
from processes import gone, read_pid, wait_for

from flowserl_cli.compose import load_config
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor import launch
from serl_launcher.supervisor.launch import check_launch, ranks_here, trainer_command, visible_gpus
from serl_launcher.supervisor.roles import roles_for


@pytest.fixture(scope="module")
def config():
    return load_config(["learner=true"])


def with_keys(config, **keys):
    changed = copy.deepcopy(config)
    with open_dict(changed):
        changed.launch.update(keys)
    return changed


def plan_of(config):
    command = trainer_command(config, "serl_launcher.learner", "runs/x")
    assert command[:3] == (sys.executable, "-m", "serl_launcher.supervisor.several")
    assert command[4:] == ("serl_launcher.learner", "runs/x")
    return json.loads(command[3])


def test_auto_is_a_process_for_each_visible_gpu_and_one_on_a_cpu(config, monkeypatch):
    monkeypatch.setattr(launch, "visible_gpus", lambda: 8)
    plan = plan_of(with_keys(config, num_processes="auto"))
    assert (plan["here"], plan["world"], plan["first"]) == (8, 8, 0)
    on_cpu = OmegaConf.merge(config, {"trainer": {"device": "cpu"}, "launch": {"num_processes": "auto"}})
    assert ranks_here(on_cpu) == 1
    monkeypatch.setattr(launch, "visible_gpus", lambda: 0)
    assert (
        trainer_command(with_keys(config, num_processes="auto"), "serl_launcher.learner")[2]
        == "serl_launcher.supervisor.lifeline"
    )
    assert ranks_here(with_keys(config, num_processes=2)) == 2  # on a CPU a number is taken as it is


@pytest.mark.parametrize(("said", "count"), [("0,1,2", 3), ("3", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("MIG-a", 1)])
def test_visible_gpus_are_those_of_cuda_visible_devices(monkeypatch, said, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus() == count


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_processes": 9}, "launch.num_processes=9: expected at most 8, a process for each visible GPU"),
        ({"num_processes": 0}, "launch.num_processes=0: expected auto or from 1"),
        ({"num_processes": True}, "launch.num_processes=True: expected auto or from 1"),
        ({"engine": "horovod"}, "launch.engine=horovod: expected plain | ddp | zero2 | fsdp2"),
        ({"engine": "plain", "num_processes": 2}, "launch.engine=plain: expected ddp, zero2 or fsdp2 for 2 processes"),
        ({"num_processes": 7, "engine": "ddp"}, "trainer.batch_size=24: expected a multiple of 7"),
        ({"gpu_ids": "all"}, "launch.gpu_ids=all: expected one of the keys engine, "),
    ],
)
def test_what_cannot_be_started_is_refused_by_its_key(config, monkeypatch, keys, said):
    monkeypatch.setattr(launch, "visible_gpus", lambda: 8)
    with pytest.raises(ValueError, match="expected") as refused:
        check_launch(with_keys(config, **keys))
    assert str(refused.value).startswith(said)


MACHINES = {"num_machines": 2, "num_processes": 1, "engine": "ddp", "main_host": "10.0.0.1", "main_port": 29500}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"main_host": "???"}, "launch.main_host: expected the name or address of the first machine"),
        ({"main_host": None}, "launch.main_host=None: expected the name or address of the first machine"),
        ({"main_port": None}, "launch.main_port=None: expected a port of the first machine"),
        ({"machine_rank": 2}, "launch.machine_rank=2: expected from 0 to 1 (launch.num_machines - 1)"),
        ({"num_machines": 0}, "launch.num_machines=0: expected a whole number from 1"),
        ({}, "bind_host=127.0.0.1: the other machines find no gateway at launch.main_host=10.0.0.1"),
    ],
)
def test_several_machines_are_refused_by_key_where_they_cannot_meet(config, keys, said):
    with pytest.raises(ValueError, match=r"expected|find no gateway") as refused:
        check_launch(with_keys(config, **MACHINES | keys))
    assert str(refused.value).startswith(said)


def test_a_machine_beyond_the_first_follows_and_trains_and_does_nothing_else(config, tmp_path):
    second = with_keys(config, **MACHINES, machine_rank=1)
    assert [role.name for role in roles_for(second, RunPaths(tmp_path), ())] == ["follower", "trainer"]
    plan = plan_of(second)
    assert (plan["first"], plan["world"], plan["address"], plan["port"]) == (1, 2, "10.0.0.1", 29500)
    second.schedule.stages = [{"name": "only", "mode": "demo", "episodes": 1}]
    with pytest.raises(ValueError, match="no stage of the schedule trains"):
        check_launch(second)


RANK = """
import os, signal, sys, time
rank, folder = os.environ["RANK"], sys.argv[1]
if rank != "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(f"{folder}/{rank}.new", "w") as file:
    file.write(str(os.getpid()))
os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}")
if len(sys.argv) > 2 and rank == sys.argv[2]:
    sys.exit(int(sys.argv[3]))
time.sleep(600)
"""


def start(tmp_path, *args: str) -> subprocess.Popen:
    (tmp_path / "a_rank.py").write_text(RANK)
    plan = {"here": 2, "world": 2, "first": 0, "threads": 1, "address": None, "port": None}
    command = [sys.executable, "-m", "serl_launcher.supervisor.several", json.dumps(plan), "a_rank", str(tmp_path)]
    return subprocess.Popen([*command, *args], env={**os.environ, "PYTHONPATH": str(tmp_path)}, start_new_session=True)


def pids(tmp_path) -> list[int]:
    wait_for(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)), "the ranks")
    return [read_pid(tmp_path / str(rank)) for rank in range(2)]


def test_a_rank_that_fails_ends_all_with_its_code(tmp_path):
    assert start(tmp_path, "1", "2").wait(30) == 2
    wait_for(lambda: all(map(gone, pids(tmp_path))), "the end of both")


def test_a_rank_that_is_killed_ends_all_as_it_did(tmp_path):
    several = start(tmp_path)
    ranks = pids(tmp_path)
    assert {os.getpgid(pid) for pid in ranks} == {several.pid}  # the supervisor's signals reach them
    os.kill(ranks[1], signal.SIGKILL)
    assert several.wait(30) == -signal.SIGKILL
    wait_for(lambda: all(map(gone, ranks)), "the end of both")


def test_no_rank_outlives_whoever_started_it(tmp_path):
    several = start(tmp_path)
    ranks = pids(tmp_path)
    several.kill()
    several.wait()
    wait_for(lambda: gone(ranks[0]), "the end of rank 0")
    os.kill(ranks[1], signal.SIGKILL)  # one that does not react is ended by the lifeline's watch, ten seconds later
