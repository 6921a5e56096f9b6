"""The configuration file of LeRobot's actor and learner for this task: the values of its own gym-hil recipe.

What differs from that recipe, and why: no GPU; a convolutional encoder that is trained, since the recipe's pretrained
ResNet-10 is frozen at 128 px and comes from the hub; the batch of the image task, so that two cores can run it.
"""

from pathlib import Path

from side_by_side.lerobot_env import ENV_ID, GRIPPER_PENALTY
from side_by_side.side_task import Settings

from serl_transport.contract.specs import TaskSpec

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
BATCH = {"state": 256, "images": 64}
DATASET = "flowserl/side_by_side"


def build(spec: TaskSpec, settings: Settings, folder: Path, port: int, fps: int) -> dict:
    """For `lerobot.rl.train_rl.TrainRLServerPipelineConfig`."""
    images = {f"observation.images.{c}": {"type": "VISUAL", "shape": [3, *size]} for c, size in spec.cameras.items()}
    inputs = {**images, "observation.state": {"type": "STATE", "shape": [len(spec.state_names)]}}
    outputs = {"action": {"type": "ACTION", "shape": [3]}}
    features = {**inputs, **outputs}
    statistics = {
        **{name: IMAGENET for name in images},
        "observation.state": {"min": list(spec.state_low), "max": list(spec.state_high)},
        "action": {"min": [-1.0] * 3, "max": [1.0] * 3},
    }
    return {
        "output_dir": str(folder / "lerobot"),
        "job_name": "side_by_side",
        "seed": settings.seed,
        "batch_size": BATCH[settings.observation],
        "log_freq": 100,
        "save_checkpoint": False,
        "dataset": {"repo_id": DATASET, "root": str(folder / "demonstrations"), "use_imagenet_stats": False},
        "env": {
            "type": "gym_manipulator",
            "name": "gym_hil",
            "task": ENV_ID,
            "fps": fps,
            "features": features,
            "features_map": {name: name for name in features},
            "processor": {
                "control_mode": "gamepad",
                "gripper": {"use_gripper": True, "gripper_penalty": GRIPPER_PENALTY},
            },
        },
        "algorithm": {
            "type": "sac",
            "discount": 0.97,
            "temperature_init": 0.01,
            "utd_ratio": 2,
            "grad_clip_norm": 10.0,
        },
        "policy": {
            "type": "gaussian_actor",
            "input_features": inputs,
            "output_features": outputs,
            "dataset_stats": statistics,
            "device": "cpu",
            "storage_device": "cpu",
            "push_to_hub": False,
            "vision_encoder_name": None,
            "freeze_vision_encoder": False,
            "num_discrete_actions": 3,
            "latent_dim": 64,
            "policy_kwargs": {"use_tanh_squash": True, "std_min": 1e-5, "std_max": 5, "init_final": 0.05},
            "online_steps": 10 * settings.env_steps + 10_000,  # the run is ended from outside, at env_steps
            "online_buffer_capacity": settings.env_steps + 2_000,
            "offline_buffer_capacity": settings.env_steps + 5_000,
            "online_step_before_learning": 100,
            "actor_learner_config": {"learner_host": "127.0.0.1", "learner_port": port},
        },
    }
