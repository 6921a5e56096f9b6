"""Fine-tune a policy on a LeRobot dataset: no robot, no gateway, one process.

    python examples/train_sft.py DATASET OUTPUT policy=pi0 policy.checkpoint=<folder> [sft.steps=2000 sft.batch_size=8]

DATASET is a LeRobotDataset v3, a folder or owner/name on the hub; with meta/modality.json its slices and cameras are
used, else LeRobot's names.
The task (sizes, ranges, prompt) comes from the dataset, the units from the checkpoint. config/sft/default.yaml has
the keys of `sft.*`; `sft=groot_so101` takes a whole recipe. OUTPUT is a run folder: config.yaml, params/ (the last
version), best/ (that of the lowest held-out loss), checkpoints/, metrics/. The same command goes on with what was cut.
Exit codes: 0 done, 1 training failed, 2 a mistake of the user, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import logging
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from hydra import compose
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowserl_cli.compose import CONFIG_DIR, ConfigError, composing, load_config, open_lab
from serl_config.mistakes import mistake_message
from serl_launcher.agents.build import build_agent
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.learner.fine_tuning import Best, FineTuning, SftSettings
from serl_launcher.learner.fit_check import unfit
from serl_launcher.learner.held_out import HeldOut, split
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.relative import measure
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.settings_check import chunk_of
from serl_launcher.learner.sft import Chunks
from serl_launcher.learner.stage import StageProgress, StageSettings
from serl_launcher.learner.step_log import StepLog
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.run.config import read_config
from serl_launcher.run.files import PART, write_text
from serl_launcher.run.parameters import BEST
from serl_launcher.run.paths import RunPaths
from serl_launcher.telemetry.metrics import MetricsWriter

FREE = ("dataset.folder", "sft.workers", "sft.log_period", "trainer.threads", "trainer.device", "telemetry")
"""What may differ when a run goes on: nothing of it changes what is learned."""


def configured(overrides: list[str]) -> DictConfig:
    """config/base.yaml with the recipe (`sft=`, by default `algo=sft_pi0` with config/sft/default.yaml) and the words.

    Raises ConfigError naming the word that is wrong.
    """
    recipe = any(word.startswith("sft=") for word in overrides)
    words = [*([] if recipe else ["sft=default", "algo=sft_pi0"]), *overrides]
    checked = load_config(words)  # says what is wrong; its result is resolved, with the default task
    if checked.checkpoint_path:
        raise ConfigError("checkpoint_path is for an online run; fine-tuning begins from policy.checkpoint=<folder>")
    words, lab = open_lab(words)
    with composing(CONFIG_DIR, lab):
        cfg = compose("base", words)
    OmegaConf.set_struct(cfg, False)
    return cfg


def opened(dataset: str | Path, cfg: DictConfig) -> tuple[FlowPolicy, Chunks, Dataset]:
    """The policy for the task that the dataset describes, and the dataset's rows with its chunks of actions.

    Raises ValueError naming what the dataset lacks, or the file, row or dim that cannot be trained on.
    """
    data = Dataset(dataset)
    rows = data.rows(spec := data.spec())
    for note in rows.notes:
        print(f"note: {note}", flush=True)
    if measure(cfg, rows, spec, chunk_of(cfg)):
        print("relative actions: their ranges are measured over every chunk of the dataset", flush=True)
    policy = instantiate(cfg.policy, spec=spec)
    if wrong := unfit(policy.units, rows, spec, policy.action_horizon):
        raise ValueError("; ".join(wrong))
    return policy, Chunks(rows, policy.action_horizon), data


def sorted_rows(chunks: Chunks, settings: SftSettings, seed: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The rows that train, and those of each held-out episode; printed, so that the log names them."""
    bounds = chunks.bounds
    held_out = split(len(bounds), settings.held_out, seed)
    by_episode = [np.arange(*ends) for ends in bounds]
    rows = np.concatenate([r for episode, r in enumerate(by_episode) if episode not in held_out])[
        : settings.max_samples
    ]
    if len(rows) < settings.batch_size:
        raise ValueError(f"dataset: {len(rows)} samples do not fill a batch of {settings.batch_size}")
    print(f"{len(rows)} samples of {len(bounds) - len(held_out)} episodes")
    told = f"held out: episodes {', '.join(map(str, held_out))}" if held_out else "no episode is held out"
    print(f"{told} (sft.held_out={settings.held_out:g} of {len(bounds)}, seed {seed})", flush=True)
    return rows, {episode: by_episode[episode] for episode in held_out}


def claim(output: Path, cfg: DictConfig, modality: Path | None) -> None:
    """Make OUTPUT a run folder of this config, or find that it is one. ValueError naming what differs."""
    config = output / "config.yaml"
    if config.is_file():
        theirs, ours = (dotted(OmegaConf.to_container(c, resolve=True)) for c in (read_config(config), cfg))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key) and not key.startswith(FREE):
                raise ValueError(
                    f"{output}: was begun with {key}={theirs.get(key)}, now it is {ours.get(key)}: the command that "
                    "began it goes on with it, another one needs another folder"
                )
        return
    if output.exists() and any(path.suffix != PART for path in output.iterdir()):
        raise ValueError(f"{output}: holds files already, and no config.yaml of a run; name another folder")
    if modality:
        write_text(output / "modality.json", modality.read_text())
    write_text(config, OmegaConf.to_yaml(cfg, resolve=True), durable=True)


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of nested sections and lists by its dotted key."""
    if not isinstance(node, dict | list) or not node:
        return {prefix.rstrip("."): node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {key: value for name, child in items for key, value in dotted(child, f"{prefix}{name}.").items()}


def build(dataset: str, output: Path, cfg: DictConfig) -> FineTuning:
    """Everything that goes before the first step. OUTPUT is made when nothing is wrong; what it holds is gone on from.

    Raises ValueError or OSError in the user's words.
    """
    settings, paths = SftSettings(**cfg.sft), RunPaths(output)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.trainer.threads)
    policy, chunks, data = opened(dataset, cfg)
    rows, held_out = sorted_rows(chunks, settings, cfg.seed)
    print(parameter_table(policy), flush=True)
    cfg.task = {"name": "dataset", "spec": chunks.spec.to_dict(), "noop_dims": None, "rate_hz": None}
    cfg.dataset = {"folder": str(data.folder.absolute()), "episodes": len(chunks.bounds), "frames": len(chunks)}
    claim(output, cfg, data.columns.described)
    accelerator = Accelerator(cpu=cfg.trainer.device == "cpu")
    agent = build_agent(cfg, policy, chunks.spec).to(accelerator.device)
    optimizer = instantiate(cfg.trainer.optimizer, _partial_=True, lr=settings.lr)
    limits = {"max_grad_norm": cfg.trainer.max_grad_norm, "ema_decay": cfg.trainer.ema_decay}
    learner = Learner(agent, optimizer, accelerator, **limits)
    progress = StageProgress(
        StageSettings(round(settings.warmup * settings.steps), cfg.trainer.final_lr_scale, 1.0, math.inf)
    )
    publisher = Publisher(paths.params, learner, policy, name=cfg.policy.name, keep=1)
    rng, keep = np.random.default_rng(cfg.seed), cfg.trainer.keep_checkpoints
    checkpoints = TrainerCheckpoints(paths.checkpoints, learner, progress, publisher, rng, keep)
    checkpoints.resume(None)
    ticks, samples = cfg.rollout.execute_horizon, (settings.eval_samples, settings.batch_size)
    return FineTuning(
        learner,
        chunks,
        rows,
        HeldOut(chunks, held_out, *samples, ticks, cfg.serving.flow_steps),
        progress,
        publisher,
        checkpoints,
        Best(output / BEST, learner, publisher),
        StepLog(MetricsWriter(paths, cfg), settings.log_period),
        settings,
        seed=cfg.seed,
    )


def train(tuning: FineTuning) -> int:
    """To the last step (0), or to the first SIGINT or SIGTERM (128 and its number); a second one ends at once."""
    came: list[int] = []

    def stop(signum: int, _frame: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)
        came.append(signum)
        tuning.stop()

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        tuning.run()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0 if tuning.finished else 128 + came[0]


def main(argv: list[str] | None = None) -> int:
    """The exit code; see the module's docstring."""
    arguments = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(arguments) < 2 or "=" in arguments[0] or "=" in arguments[1]:
        print(__doc__, file=sys.stderr)
        return 2
    output = Path(arguments[1])
    try:
        tuning = build(arguments[0], output, configured(arguments[2:]))
        code = train(tuning)
    except (ValueError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError) as mistake:
        print(f"train_sft: {mistake_message(mistake)}", file=sys.stderr)
        return 2
    except FloatingPointError as fault:
        print(
            f"train_sft: {fault}: training ends; {output} has what came before, a lower sft.lr may help",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("train_sft: stopped before the first step", file=sys.stderr)
        return 130
    if code:
        print(f"train_sft: stopped at step {tuning.taken}, all of it saved: the same command goes on", file=sys.stderr)
        return code
    print(f"written: {output}; take it out with tools/export_checkpoint.py {output} <folder>")
    if tuning.best.step:
        found = f"{tuning.best.loss:.4f} at step {tuning.best.step}"
        print(f"lowest held-out loss: {found}, in {output / BEST} (--version best)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
