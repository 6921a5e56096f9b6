"""Fine-tune a policy on a LeRobot dataset: no robot, no gateway, one process.

    python examples/train_sft.py DATASET OUTPUT policy=pi0 policy.checkpoint=<folder> [sft.steps=2000 sft.batch_size=8]

DATASET is a LeRobotDataset v3, a folder or owner/name on the hub; with meta/modality.json its slices and cameras are
used, else LeRobot's names.
The task (sizes, ranges, prompt) comes from the dataset, the units from the checkpoint. OUTPUT gets config.yaml,
metrics.jsonl and params/ (so that tools/export_checkpoint.py and tools/eval_open_loop.py take it as a run).
"""

import json
import logging
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowserl_cli.compose import CONFIG_DIR, ConfigError, load_config
from serl_config.nearest import nearest
from serl_launcher.agents.build import build_agent
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.learner.learner import Learner, Schedule
from serl_launcher.learner.sft import Chunks, check_batch, train
from serl_launcher.learner.step_log import numbers
from serl_launcher.policies.base import frozen_hash
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.run.parameters import base_sha256, publish

SFT = {"steps": 1000, "batch_size": 8, "lr": 5e-4, "warmup": 50, "max_samples": None, "log_period": 10}


def configured(overrides: list[str]) -> DictConfig:
    """config/base.yaml with `algo=sft_pi0` and the user's overrides; `sft.*` are this script's own keys.

    Raises ConfigError naming the word that is wrong.
    """
    own = [o for o in overrides if o.lstrip("+").startswith("sft.")]
    words = ["algo=sft_pi0", *(o for o in overrides if o not in own)]
    load_config(words)  # says what is wrong; its result is resolved, with the default task
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        cfg = compose("base", words)
    OmegaConf.set_struct(cfg, False)
    cfg.sft = OmegaConf.create(SFT | own_keys(own))
    return cfg


def own_keys(words: list[str]) -> dict[str, Any]:
    """`sft.*` words as checked values by key. Raises ConfigError naming the word that is wrong."""
    values = {}
    for word in words:
        key, _, text = word.lstrip("+").removeprefix("sft.").partition("=")
        if key not in SFT:
            raise ConfigError(f"unknown key 'sft.{key}' in {word!r}{nearest(key, list(SFT))}")
        kind, least = (float, 0.0) if key == "lr" else (int, 0 if key == "warmup" else 1)
        try:
            values[key] = None if key == "max_samples" and text == "null" else kind(text)
            good = values[key] is None or least <= values[key] < math.inf
        except ValueError:
            good = False
        if not good:
            expected = f"a {'whole ' if kind is int else ''}number, at least {least:g}"
            raise ConfigError(f"sft.{key} in {word!r} must be {expected} (default {SFT[key]}), got {text!r}")
    return values


def run(dataset: str, output: Path, cfg: DictConfig) -> None:
    """Train and write. Raises ValueError or OSError in the user's words."""
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output}: holds files already; name a folder that does not exist")
    data = Dataset(dataset)
    rows = data.rows(spec := data.spec())
    for note in rows.notes:
        print(f"note: {note}", flush=True)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.trainer.threads)
    policy = instantiate(cfg.policy, spec=spec)
    chunks = Chunks(rows, policy.action_horizon, cfg.sft.max_samples)
    check_batch(chunks, cfg.sft.batch_size)  # before OUTPUT exists: a corrected command must find it free
    print(f"{len(chunks)} samples of {len(rows.episodes)} episodes\n{parameter_table(policy)}", flush=True)
    accelerator = Accelerator(cpu=cfg.trainer.device == "cpu")
    agent = build_agent(cfg, policy, spec).to(accelerator.device)
    optimizer = instantiate(cfg.trainer.optimizer, _partial_=True, lr=cfg.sft.lr)
    limits = {"max_grad_norm": cfg.trainer.max_grad_norm, "ema_decay": cfg.trainer.ema_decay}
    learner, frozen = Learner(agent, optimizer, accelerator, **limits), frozen_hash(policy)
    output.mkdir(parents=True, exist_ok=True)
    cfg.task = {"name": "dataset", "spec": spec.to_dict(), "noop_dims": None, "rate_hz": None}
    OmegaConf.save(cfg, output / "config.yaml", resolve=True)
    if data.columns.described:
        shutil.copyfile(data.columns.described, output / "modality.json")
    schedule = Schedule(steps=cfg.sft.steps, warmup=cfg.sft.warmup)
    with (output / "metrics.jsonl").open("w") as log:
        steps = train(learner, chunks, cfg.sft.steps, cfg.sft.batch_size, cfg.seed, schedule)
        for step, metrics in enumerate(steps, 1):
            metrics = numbers(metrics)  # every step is logged here
            log.write(json.dumps({"step": step, **metrics}) + "\n")
            if step % cfg.sft.log_period == 0:
                print(f"step {step}/{cfg.sft.steps}  loss {metrics['losses/flow']:.4f}", flush=True)
    if frozen_hash(policy) != frozen:
        raise RuntimeError("frozen parameters changed while training")
    published = {"version": 1, "step": cfg.sft.steps, "base": base_sha256(policy), "policy": cfg.policy.name}
    publish(output / "params", learner.averaged, now=time.time(), keep=1, **published)
    print(f"written: {output}; take it out with tools/export_checkpoint.py {output} <folder>")


def main(argv: list[str] | None = None) -> int:
    """Exit 0, or 2 on a mistake of the user."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(arguments) < 2 or "=" in arguments[0] or "=" in arguments[1]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        run(arguments[0], Path(arguments[1]), configured(arguments[2:]))
    except (ValueError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError) as mistake:
        print(f"train_sft: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
