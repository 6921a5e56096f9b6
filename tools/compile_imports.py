"""Imports once what the processes of a run import, so that its bytecode is on disk. tools/bootstrap.sh calls it.

Python writes a module's bytecode at its first import. The roles of a run start together, and each would compile the
same libraries beside the others; where PYTHONDONTWRITEBYTECODE is set, at every start anew (20 s of CPU for the policy
libraries). Only what is imported is compiled: a quarter of the environment's files. A failing import is an environment
that does not work, and ends this with its traceback.

    python tools/compile_imports.py learner|actor|lerobot
"""

import importlib
import pkgutil
import sys

OURS = {
    "actor": ("serl_config", "openpi_client", "serl_transport", "serl_robot_infra"),
    "lerobot": ("serl_config", "openpi_client", "serl_transport", "serl_robot_infra"),
    "learner": ("flowserl_cli", "serl_config", "openpi_client", "serl_transport", "serl_robot_infra", "serl_launcher"),
}
# What our modules import inside functions, where it is needed.
LATER = {
    "actor": ("serl_config", "mujoco", "av", "pyarrow.parquet"),
    "lerobot": ("serl_config", "mujoco", "av", "lerobot.robots.so_follower", "lerobot.teleoperators.so_leader", "cv2"),
    "learner": (
        "accelerate.commands.launch",
        "gym_hil.envs",
        "lerobot.policies.factory",
        "lerobot.policies.groot.groot_n1_7",
        "lerobot.policies.groot.processor_groot",
        "lerobot.policies.pi0.modeling_pi0",
        "lerobot.policies.pi0.processor_pi0",
        "lerobot.policies.pi05.modeling_pi05",
        "lerobot.policies.pi05.processor_pi05",
        "matplotlib.pyplot",
        "metaworld.env_dict",
        "metaworld.policies",
        "peft",
        "rerun",
        "torch._dynamo",
        "torch.utils.tensorboard.writer",
        "torchvision.transforms.v2",
    ),
}


def main() -> None:
    """Import it all."""
    kind = sys.argv[1]
    for name in (*OURS[kind], *LATER[kind]):
        module = importlib.import_module(name)
        if name in OURS[kind]:
            for found in pkgutil.walk_packages(module.__path__, f"{name}."):
                if not found.name.endswith("__main__"):
                    importlib.import_module(found.name)


if __name__ == "__main__":
    main()
