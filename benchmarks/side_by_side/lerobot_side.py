"""One run of LeRobot's actor and learner: two processes over gRPC on loopback, then the evaluation of the snapshots.

Called by run.py. CPU time is that of both processes; time stands still while the policies are evaluated, which is
after training, so that it costs neither side anything.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
from lockstep import rate
from side_by_side import lerobot_config, lerobot_demos
from side_by_side.lerobot_env import ActionUnits, to_gym
from side_by_side.side_task import FIRST_SEED, Robot, Settings, evaluate

from serl_transport.contract.schema import Observation

LONGEST_PAUSE_S = 900.0  # without a new snapshot


def run(settings: Settings, fps: int, keep: Path | None) -> Iterator[dict]:
    """Rows `before`, `curve`, `after`. Raises RuntimeError with the log when a process of LeRobot's ends early."""
    started, cpu_before = time.time(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="flowserl-lerobot-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        robot = Robot(settings)
        demo_steps = lerobot_demos.record(robot, settings, folder / "demonstrations")
        config = lerobot_config.build(robot.env.spec, settings, folder, _free_port(), fps)
        (folder / "run.json").write_text(json.dumps(asdict(settings)))
        for role in ("learner", "actor"):  # each would refuse the other's output folder
            own = config | {"output_dir": f"{config['output_dir']}_{role}"}
            (folder / f"{role}.json").write_text(json.dumps(own, indent=1))
        own_cpu = time.process_time() - cpu_before
        snapshots = list(_train(folder, started, own_cpu))
        for snapshot in snapshots:
            trials = settings.episodes_at(snapshot["point"])
            first = FIRST_SEED[snapshot["point"]]
            row = {key: snapshot[key] for key in snapshot.keys() - {"file", "time"}}
            file = Path(snapshot["file"])
            sampled, of_mean = (
                evaluate(robot.env, policy_of(config, file, robot, settings.seed, mean=mean), trials, first)
                for mean in (False, True)
            )
            yield {
                **rate(sampled, trials),
                "success_rate_of_mean_action": round(of_mean / trials, 4),
                **row,
                "demo_steps": demo_steps,
                "fps": fps,
                "batch_size": config["batch_size"],
            }
        robot.env.close()


def _train(folder: Path, started: float, own_cpu: float) -> Iterator[dict]:
    """The snapshots as they come, up to the last one; both processes are ended then, whatever happens."""
    log, seen, last = folder / "snapshots.jsonl", 0, time.monotonic()
    children: dict[str, subprocess.Popen] = {}
    try:
        for role in ("learner", "actor"):
            children[role] = _start(role, folder)
        usage = {role: psutil.Process(child.pid) for role, child in children.items()}
        while True:
            time.sleep(0.2)
            for role, child in children.items():
                if child.poll() is not None or time.monotonic() - last > LONGEST_PAUSE_S:
                    text = (folder / f"{role}.log").read_text()[-3000:]
                    raise RuntimeError(f"LeRobot's {role} ended or stood still (exit {child.poll()}):\n{text}")
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines[seen:]:
                row = json.loads(line)
                cpu = own_cpu + sum(sum(process.cpu_times()[:2]) for process in usage.values())
                row["minutes"] = round((row["time"] - started) / 60, 3)
                row["cpu_minutes"] = round(cpu / 60, 3)
                row["optimizer_steps"] = _optimizer_steps(folder / "learner.log")
                seen, last = seen + 1, time.monotonic()
                yield row
                if row["point"] == "after":
                    return
    finally:
        _end(children.values())


def _start(role: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    files = [str(folder / f"{name}.json") for name in ("run", role)]
    command = [sys.executable, "-P", "-m", "side_by_side.lerobot_role", role, *files]
    with (folder / f"{role}.log").open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _end(children) -> None:
    """Ask, wait, then end them and whatever they started."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _optimizer_steps(log: Path) -> int:
    """What its learner logged last, in steps of log_freq."""
    found = [line for line in log.read_text(errors="replace").splitlines() if "Number of optimization step:" in line]
    return int(found[-1].rsplit(":", 1)[1]) if found else 0


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def policy_of(config: dict, file: Path, robot: Robot, seed: int, *, mean: bool) -> Callable[[Observation], np.ndarray]:
    """A snapshot as a function of our observation, through LeRobot's own processors.

    As its actor acts (`select_action`, a sample), or with the mean of that distribution.
    """
    import draccus
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.gaussian_actor.modeling_gaussian_actor import GaussianActorPolicy
    from lerobot.processor import VanillaObservationProcessorStep

    with draccus.config_type("json"):
        policy_config = draccus.decode(PreTrainedConfig, dict(config["policy"]))
    policy = GaussianActorPolicy(policy_config).eval()
    policy.load_state_dict(torch.load(file, weights_only=True))
    before, after = make_pre_post_processors(policy_cfg=policy_config, dataset_stats=policy_config.dataset_stats)
    vanilla, units = VanillaObservationProcessorStep(), ActionUnits(np.asarray(robot.env.spec.action_high[:3]))
    torch.manual_seed(seed)

    @torch.no_grad()
    def act(observation: Observation) -> np.ndarray:
        batch = before.process_observation(vanilla.observation(to_gym(observation)))
        action = policy.select_action(batch)
        if mean:
            action = torch.cat([policy.actor(batch, None)[2], action[..., -1:]], dim=-1)
        moved = after.process_action(action[..., :-1])
        return units.to_ours(torch.cat([moved, action[..., -1:]], dim=-1)[0].numpy())

    return act
