"""The actor against the real transport server on loopback: modes, flags, cuts, observers and exit codes."""

import io
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import scripted_learner
from scripted_learner import Screen, ScriptedLearner, actor_config, still_policy, ticket

from serl_robot_infra.envs.pick import PickEnv
from serl_robot_infra.main import main
from serl_transport.contract.errors import NotReady


@pytest.fixture(scope="module")
def spec():
    env = PickEnv(image_size=32, renderer="ray")
    yield env.spec
    env.close()


def press(signum, screen, text):
    """Signal this process once the actor has said so."""
    thread = threading.Thread(target=lambda: (screen.wait_for(text), os.kill(os.getpid(), signum)))
    thread.start()
    return thread


def run(learner, tmp_path, stream=None, **rollout):
    stream = stream or io.StringIO()
    code = main(actor_config(learner, tmp_path, **rollout), stream)
    return code, stream.getvalue()


def test_demo_online_and_eval_record_who_drove(spec, tmp_path):
    tickets = [ticket("demo", 1), ticket("online", 2), ticket("online", 3, takeover=False), ticket("eval", 1_000_000)]
    with ScriptedLearner(spec, tickets) as learner:
        code, out = run(learner, tmp_path)
        demo, online, alone, evaluation = learner.episodes()
    assert code == 0, out

    assert demo.outcome.success
    assert demo.arrays["intervention"].all()
    assert (demo.arrays["policy_version"] == -1).all()

    # The operator takes over at tick 5 and drives to the end; the policy of version 3 drove before.
    assert online.outcome.success
    assert online.arrays["intervention"].tolist() == [False] * 5 + [True] * (online.n - 5)
    assert (online.arrays["policy_version"] == 3).all()
    assert np.allclose(online.arrays["action"][:5], [0, 0, 0, -1])

    for episode in (alone, evaluation):  # nobody helps: a policy that does nothing runs into the time limit
        assert not episode.arrays["intervention"].any()
        assert episode.n == 60
        assert episode.outcome.truncated_by == "time_limit"
        assert episode.arrays["next.truncated"][-1]

    for episode in (demo, online, alone, evaluation):
        assert len(episode.arrays["observation.state"]) == episode.n + 1
        assert (np.diff(episode.arrays["time_ns"]) > 0).all()
    assert learner.wants == ["follow"] * 5
    assert "no safety limits beside action_low and action_high: task.safety is not set" in out
    assert "stage-demo · success" in out
    assert "evaluation stage-eval: 0/1 = 0.00" in out


def test_inference_is_asked_once_per_execute_horizon_and_not_while_the_operator_drives(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("online", 2)]) as learner:
        run(learner, tmp_path, execute_horizon=4)
    # Ticks 0..4 are the policy's: chunks at tick 0 and tick 4, none after the takeover.
    assert len(learner.infer_bodies) == 2
    body = learner.infer_bodies[0]
    assert sorted(body["observation"]["images"]) == ["front", "wrist"]
    assert body["prompt"] == spec.prompt
    assert body["seed"] is None


def test_evaluation_is_repeatable_and_says_so_on_the_wire(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("eval", 7), ticket("eval", 7, episode_id="again")]) as learner:
        run(learner, tmp_path, execute_horizon=8)
        first, second = learner.episodes()
    seeds = [body["seed"] for body in learner.infer_bodies]
    assert len(seeds) == 16  # 60 ticks, 8 a chunk
    assert seeds[:8] == seeds[8:] == [7 * 4096 + 8 * k for k in range(8)]
    for key in ("observation.images.front", "observation.state", "action"):
        assert np.array_equal(first.arrays[key], second.arrays[key])


def test_a_nan_action_is_not_executed_and_cuts_the_episode_naming_the_version(spec, tmp_path):
    answers = iter([np.zeros((8, 4), np.float32), np.full((8, 4), np.nan, np.float32)])

    def infer(body):
        return {"actions": next(answers), "policy_version": 12, "server_ms": 0.0}

    with ScriptedLearner(spec, [ticket("eval", 7)], infer) as learner:
        code, out = run(learner, tmp_path, execute_horizon=4)
        (episode,) = learner.episodes()
    assert code == 0
    assert "cut at tick 4: policy version 12: action dim 'dx': expected a finite number, got nan" in out
    assert episode.n == 4
    assert episode.outcome.truncated_by == "stop"
    assert episode.arrays["next.truncated"].tolist() == [False, False, False, True]
    assert "evaluation" not in out  # a cut episode says nothing about the policy


def test_the_actor_waits_for_a_policy_that_is_not_ready_yet(spec, tmp_path):
    calls = []

    def infer(body):
        calls.append(body)
        if len(calls) < 3:
            raise NotReady("version 1 is not there yet")
        return still_policy()(body)

    with ScriptedLearner(spec, [ticket("eval", 7)], infer) as learner:
        _, out = run(learner, tmp_path)
        (episode,) = learner.episodes()
    assert "policy not ready" in out
    assert episode.n == 60


def test_a_policy_that_stays_silent_in_mid_episode_cuts_it(spec, tmp_path):
    calls = []

    def infer(body):
        calls.append(body)
        if len(calls) > 1:
            raise NotReady("the policy server restarts")
        return still_policy()(body)

    with ScriptedLearner(spec, [ticket("eval", 7)], infer) as learner:
        code, out = run(learner, tmp_path, hold_limit_s=0.5)
        (episode,) = learner.episodes()
    assert code == 0
    assert episode.n == 4
    assert episode.outcome.truncated_by == "stop"
    assert "no action for" in out


def test_sigint_ends_the_episode_delivers_it_and_exits_130(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("eval", 7)]) as learner:

        def interrupt():
            deadline = time.monotonic() + 20
            while not learner.infer_bodies and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        code, out = run(learner, tmp_path, rate_hz=20)
        thread.join()
        (episode,) = learner.episodes()
    assert code == 130
    assert "stopped by SIGINT" in out
    assert 0 < episode.n < 60
    assert episode.outcome.truncated_by == "stop"


def test_everything_acknowledged_is_in_the_ledger_and_the_spool_is_empty(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("demo", seed) for seed in range(3)]) as learner:
        run(learner, tmp_path)
    rows = (tmp_path / "test" / "spool" / "actor-0.acknowledged.jsonl").read_text().splitlines()
    sent = sorted((batch.episode.episode_id, batch.first_tick, batch.n) for batch in learner.batches)
    assert sorted((row["episode_id"], row["first_tick"], row["n"]) for row in map(json.loads, rows)) == sent


def test_the_episode_limit_ends_the_run(spec, tmp_path):
    with ScriptedLearner(spec, (ticket("demo", seed) for seed in range(100))) as learner:
        code, out = run(learner, tmp_path, episodes=2, mode="demo", policy="none")
        assert len(learner.episodes()) == 2
    assert code == 0
    assert "2 episodes done" in out
    assert learner.wants == ["demo", "demo"]


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("eval", {"rollout.policy": "none"}, "rollout.policy=none cannot run the eval episode asked for"),
        ("demo", {"task.operator": None}, "a demonstration needs an operator: set task.operator"),
    ],
)
def test_a_ticket_that_this_actor_cannot_run_is_a_user_mistake(spec, tmp_path, mode, change, message):
    from omegaconf import OmegaConf

    with ScriptedLearner(spec, [ticket(mode, 1)]) as learner:
        config = actor_config(learner, tmp_path)
        for key, value in change.items():
            OmegaConf.update(config, key, value)
        stream = io.StringIO()
        assert main(config, stream) == 2
    assert message in stream.getvalue()


def test_another_task_at_the_learner_is_one_clear_message(spec, tmp_path):
    with ScriptedLearner(spec, []) as learner:
        config = actor_config(learner, tmp_path)
        config.task.env.prompt = config.task.spec.prompt = "stack the cubes"
        stream = io.StringIO()
        assert main(config, stream) == 2
    assert "prompt: stack the cubes on the actor, pick up the red cube on the learner" in stream.getvalue()


@pytest.mark.parametrize("kind", ["RuntimeError", "ConnectionError"])
@pytest.mark.parametrize("when", ["reset", "step"])
def test_a_driver_that_fails_is_one_line_and_exit_1(spec, tmp_path, when, kind):
    with ScriptedLearner(spec, [ticket("demo", 1)]) as learner:
        config = actor_config(learner, tmp_path)
        config.task.env = {"_target_": "scripted_learner.BrokenPick", "when": when, "kind": kind}
        stream = io.StringIO()
        assert main(config, stream) == 1
    out = stream.getvalue()
    assert f"actor: error: BrokenPick.{when} failed: {kind}: camera front is gone (" in out
    assert "scripted_learner.py, line" in out
    assert "Traceback" not in out


@pytest.mark.parametrize(("robot", "noise"), [("RobotPick", 0.0), ("NoisyPick", 0.15)])
def test_a_robot_is_not_disturbed_in_demonstrations_and_the_watchdog_is_told(spec, tmp_path, robot, noise):
    with ScriptedLearner(spec, [ticket("demo", 1)]) as learner:
        config = actor_config(learner, tmp_path, demo_noise="auto")
        config.task.env = {"_target_": f"scripted_learner.{robot}"}
        stream = io.StringIO()
        assert main(config, stream) == 0, stream.getvalue()
    assert scripted_learner.noises[-1] == noise
    told = "no watchdog: NoisyPick has no hold()" if noise else "watchdog: controlled stop after 500 ms"
    assert told in stream.getvalue()


def test_the_learner_of_another_run_is_one_clear_message(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("demo", 1)]) as learner:
        learner.server.run = "quickstart"
        code, out = run(learner, tmp_path)
        assert learner.episodes() == []
    assert code == 2
    assert "is of run 'quickstart', this actor of run 'test': give the actor run=quickstart, or the port=" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task.spec.max_ticks": 80}, "max_ticks: 80 in task.spec, 60 in serl_robot_infra.envs.pick.PickEnv"),
        ({"task.env.renderer": "vulkan"}, "renderer: expected one of auto, egl, osmesa, ray, got 'vulkan'"),
        ({"task.env.image_sise": 32}, "image_sise"),
        ({"task.env": {"_target_": "scripted_learner.PlainPick"}}, "PlainPick.reset(seed, *, actuator_noise=0.0)"),
        ({"task.env": {"_target_": "builtins.object"}}, "task.env: builtins.object lacks spec, reset, step, close"),
        ({"rollout.demo_noise": "some"}, "rollout.demo_noise: expected auto or a number, 0 or more, got 'some'"),
        ({"rollout.mode": "evil"}, "rollout.mode: expected one of follow, demo, online, eval, got 'evil'"),
        ({"rollout.policy": "distant"}, "rollout.policy: expected remote, local, openpi, groot or none, got 'distant'"),
        ({"rollout.execute_horizon": 0}, "execute_horizon: expected at least 1, got 0"),
        (
            {"task.saftey": {"max_speed": {"dx": 1.0}}},
            "task.saftey (config/task/<yours>.yaml or the command line): unkn",
        ),
        ({"task.saftey": {"max_speed": {"dx": 1.0}}}, "did you mean 'safety'?"),
        ({"task.safety": {"max_sped": {"dx": 1.0}}}, "task.safety.max_sped: unknown key; did you mean 'max_speed'?"),
        ({"task.safety": {"max_speed": {"dq": 1.0}}}, "max_speed: expected one of dx, dy, dz, grip, got 'dq'"),
    ],
)
def test_user_mistakes_are_one_message_and_exit_2(spec, tmp_path, change, message):
    from omegaconf import OmegaConf

    with ScriptedLearner(spec, []) as learner:
        config = actor_config(learner, tmp_path)
        for key, value in change.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        stream = io.StringIO()
        assert main(config, stream) == 2
    out = stream.getvalue()
    assert message in out
    assert "Traceback" not in out


def test_a_chunk_shorter_than_the_execute_horizon_is_a_user_mistake(spec, tmp_path):
    with ScriptedLearner(spec, [ticket("eval", 7)], still_policy(horizon=2)) as learner:
        code, out = run(learner, tmp_path, execute_horizon=4)
    assert code == 2
    assert "execute_horizon=4 is longer than the chunk, 2 actions" in out


def test_a_learner_that_comes_late_is_waited_for_and_sigterm_ends_the_waiting(spec, tmp_path):
    with ScriptedLearner(spec, []) as learner:
        config = actor_config(learner, tmp_path)
    # The learner is gone now; its port is free.
    screen = Screen()
    pressing = press(signal.SIGTERM, screen, "waiting for learner at 127.0.0.1")
    assert main(config, screen) == 0
    pressing.join()


def test_an_absent_reward_server_is_named_with_its_address_and_the_first_ctrl_c_ends_the_waiting(
    spec, tmp_path, repo_root, free_ports
):
    from omegaconf import OmegaConf

    with ScriptedLearner(spec, []) as learner:
        config = actor_config(learner, tmp_path)
        config.reward = OmegaConf.load(repo_root / "config" / "reward" / "classifier.yaml")
        config.reward.update({"port": free_ports[0], "keys_dir": None})
        screen = Screen()
        pressing = press(signal.SIGINT, screen, f"waiting for the reward server at 127.0.0.1:{free_ports[0]}")
        assert main(config, screen) == 130
        pressing.join()
    out = screen.getvalue()
    assert "reward.model=<folder>" in out
    assert "waiting for learner" not in out


def test_a_learner_that_restarts_in_mid_episode_gets_the_whole_episode(spec, tmp_path):
    asked = threading.Event()
    screen = Screen()

    def slow(body):
        asked.set()
        time.sleep(0.05)
        return still_policy()(body)

    first = ScriptedLearner(spec, [ticket("eval", 7)], slow)
    ports = (first.server.config.port_number, first.server.config.broadcast_port)
    box = []

    def restart():
        asked.wait(20)
        first.__exit__()
        screen.wait_for("learner silent for")
        box.append(ScriptedLearner(spec, [], ports=ports).__enter__())

    first.__enter__()
    thread = threading.Thread(target=restart)
    thread.start()
    code, out = run(first, tmp_path, screen, hold_limit_s=30.0)
    thread.join()
    box[0].__exit__()
    assert code == 0, out
    assert re.search(r"learner silent for \d+ s; holding", out)
    # What the first learner acknowledged it has; the second got the rest, and what was not acknowledged once more.
    batches = {batch.first_tick: batch for batch in [*first.batches, *box[0].batches]}
    assert sorted(batches) == [0, 10, 20, 30, 40, 50]
    assert batches[50].final
    assert batches[50].outcome.truncated_by == "time_limit"


def test_a_full_spool_holds_the_robot_and_loses_nothing(spec, tmp_path):
    # A demonstration of 96 px is some 1.5 MB, the spool has room for 1 MB: the learner takes nothing before it is full.
    large, screen = PickEnv(image_size=96, renderer="ray"), Screen()

    class Late(ScriptedLearner):
        def _data(self, store, payload):
            screen.wait_for("the robot holds until the learner has taken some")
            super()._data(store, payload)

    with Late(large.spec, [ticket("demo", 1), ticket("demo", 2)]) as learner:
        config = actor_config(learner, tmp_path, spool_mb=1, batch_ticks=5, pictures="raw")
        config.task.env.image_size = 96
        assert main(config, screen) == 0, screen.getvalue()
        episodes = learner.episodes()
    large.close()
    assert [episode.outcome.success for episode in episodes] == [True] * 2


def test_evaluation_without_a_learner(tmp_path):
    from omegaconf import OmegaConf

    env = PickEnv(image_size=32, renderer="ray")
    config = actor_config(None, tmp_path, mode="eval", policy="local", episodes=3)
    config.task.spec = env.spec.to_dict()
    config.ip = None
    OmegaConf.update(config, "rollout.local_policy", {"_target_": "scripted_learner.LocalStill"}, force_add=True)
    stream = io.StringIO()
    assert main(config, stream) == 0, stream.getvalue()
    assert "evaluation alone: 0/3 = 0.00" in stream.getvalue()
    config.rollout.mode = "follow"
    stream = io.StringIO()
    assert main(config, stream) == 2
    assert "ip=null runs without a learner: it needs rollout.mode=eval" in stream.getvalue()
