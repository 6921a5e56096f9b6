"""LeRobot's actor or learner, unmodified: `python -m side_by_side.lerobot_role actor|learner run.json config.json`.

lerobot_side.py starts both. The actor's process registers the environment that its configuration names, and keeps hold
of the policy that LeRobot makes, so that its parameters can be saved between two episodes and evaluated afterwards.
"""

import json
import sys
from pathlib import Path


def main(role: str, run: str, config: str) -> None:
    """Hand over to LeRobot's own entry point."""
    import torch

    torch.set_num_threads(1)
    sys.argv = [role, f"--config_path={config}"]
    if role == "learner":
        from lerobot.rl.learner import train_cli

        train_cli()
        return
    import gymnasium as gym
    import lerobot.rl.actor as lerobot_actor
    from side_by_side.lerobot_env import ENV_ID, ScriptedPickCube
    from side_by_side.side_task import Settings

    made = []
    make_policy = lerobot_actor.make_policy

    def make_and_keep(*args, **kwargs):
        made.append(make_policy(*args, **kwargs))
        return made[-1]

    def save(path: Path) -> None:
        torch.save(made[-1].state_dict(), path)

    settings = Settings(**json.loads(Path(run).read_text()))
    log = Path(run).with_name("snapshots.jsonl")
    lerobot_actor.make_policy = make_and_keep
    gym.register(
        f"gym_hil/{ENV_ID}",
        entry_point=lambda **_: ScriptedPickCube(settings, log, save),
        disable_env_checker=True,
        order_enforce=False,
    )
    lerobot_actor.actor_cli()


if __name__ == "__main__":
    main(*sys.argv[1:])
