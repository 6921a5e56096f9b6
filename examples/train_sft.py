"""Fine-tune a policy on a LeRobot dataset: no robot, no gateway, one process.

    python examples/train_sft.py DATASET OUTPUT policy=pi0 policy.checkpoint=<folder> [sft.steps=2000 sft.batch_size=8]

DATASET is a LeRobotDataset v3, a folder or owner/name on the hub; with meta/modality.json its slices and cameras are
used, else LeRobot's names.
The task (sizes, ranges, prompt) comes from the dataset, the units from the checkpoint. config/sft/default.yaml has
the keys of `sft.*`; `sft=groot_so101` takes a whole recipe. OUTPUT is a run folder: config.yaml, params/ (the last
version), best/ (that of the lowest held-out loss), checkpoints/, metrics/. The same command goes on with what was cut.
Exit codes: 0 done, 1 training or the overfit check (`sft.overfit`) failed, 2 a mistake of the user, 130 and 143 stopped
by SIGINT and SIGTERM.
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
from serl_launcher.learner.augment import Augment
from serl_launcher.learner.fine_tuning import Best, FineTuning, SftSettings
from serl_launcher.learner.fit_check import unfit
from serl_launcher.learner.held_out import HeldOut, split
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.overfit import Overfit, baselines
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.relative import measure
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.settings_check import chunk_of
from serl_launcher.learner.sft import Chunks
from serl_launcher.learner.stage import StageProgress, StageSettings
from serl_launcher.learner.step_log import StepLog
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.open_loop import hold_still
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.run.config import dotted, read_config
from serl_launcher.run.data_record import dataset_digest
from serl_launcher.run.files import PART, write_text
from serl_launcher.run.parameters import BEST
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import note_start
from serl_launcher.telemetry.journal_page import JournalPage
from serl_launcher.telemetry.metrics import MetricsWriter
from serl_launcher.telemetry.registry import update

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
    """The rows that train, and those of each episode that is measured: held out, or the same ones for `sft.overfit`.

    Printed, so that the log names them. Raises ValueError where there are too few.
    """
    episodes = [np.arange(*ends) for ends in chunks.bounds]
    if settings.overfit:
        if settings.overfit > len(episodes):
            raise ValueError(
                f"sft.overfit: expected at most the dataset's {len(episodes)} episodes, got {settings.overfit}"
            )
        measured = training = range(settings.overfit)
        told = f"overfit check: the first {len(training)} of {len(episodes)} episodes train and are measured"
    else:
        measured = split(len(episodes), settings.held_out, seed)
        training = [episode for episode in range(len(episodes)) if episode not in measured]
        told = f"held out: episodes {', '.join(map(str, measured))}" if measured else "no episode is held out"
        told += f" (sft.held_out={settings.held_out:g} of {len(episodes)}, seed {seed})"
    rows = np.concatenate([episodes[episode] for episode in training])[: settings.max_samples]
    if len(rows) < settings.batch_size:
        raise ValueError(f"dataset: {len(rows)} samples do not fill a batch of {settings.batch_size}")
    print(f"{len(rows)} samples of {len(training)} episodes\n{told}", flush=True)
    return rows, {episode: episodes[episode] for episode in measured}


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


def measuring(
    cfg: DictConfig, policy: FlowPolicy, chunks: Chunks, rows: dict[int, np.ndarray]
) -> tuple[HeldOut, Overfit | None]:
    """How these episodes are measured during training, and the check of `sft.overfit` where it is asked for."""
    ticks, overfit = min(cfg.rollout.execute_horizon, policy.action_horizon), cfg.sft.overfit is not None
    held_out = HeldOut(
        chunks,
        rows,
        samples=cfg.sft.eval_samples,
        ticks=ticks,
        steps=cfg.serving.flow_steps,
        batch_size=cfg.sft.batch_size,
        group="overfit" if overfit else "held_out",
    )
    if not overfit:
        return held_out, None
    known = chunks.rows
    still = hold_still(known.action_names, known.state_names, None, chunks.spec.target_dims)
    chosen, scale = [row for r in held_out.rows.values() for row in r], policy.action_units.unit.cpu().numpy()
    return held_out, Overfit(baselines(known, chosen, ticks, scale, still))


def build(dataset: str, output: Path, cfg: DictConfig) -> FineTuning:
    """Everything that goes before the first step. OUTPUT is made when nothing is wrong; what it holds is gone on from.

    Raises ValueError or OSError in the user's words.
    """
    settings, paths = SftSettings(**cfg.sft), RunPaths(output)
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.trainer.threads)
    policy, chunks, data = opened(dataset, cfg)
    rows, measured = sorted_rows(chunks, settings, cfg.seed)
    held_out, overfit = measuring(cfg, policy, chunks, measured)
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
    return FineTuning(
        learner,
        chunks,
        rows,
        held_out,
        progress,
        publisher,
        checkpoints,
        Best(output / BEST, learner, publisher),
        StepLog(MetricsWriter(paths, cfg), settings.log_period),
        settings,
        seed=cfg.seed,
        overfit=overfit,
        augment=Augment(**cfg.trainer.augment),
    )


def record_start(output: Path, words: list[str], state: str) -> JournalPage:
    """Which code, config and data this start trains with, in OUTPUT's record; its row in the index of runs_dir.

    OSError when the disk refuses.
    """
    paths, cfg = RunPaths(output), read_config(output / "config.yaml")
    data = dict(cfg.dataset) | {"digest": dataset_digest(Path(cfg.dataset.folder))}
    note_start(paths, "train_sft", words, state, data)
    page = JournalPage(paths, print)
    page.start()
    update_index(output)
    return page


def update_index(output: Path) -> None:
    """The row of a folder in runs_dir; a folder elsewhere has none. OSError when the disk refuses."""
    runs = Path(read_config(output / "config.yaml").get("runs_dir") or "runs")
    if output.resolve().parent == runs.resolve():
        update(output)


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
        state = "resumed" if (output / "config.yaml").is_file() else "new"
        tuning = build(arguments[0], output, configured(arguments[2:]))
        page = record_start(output, arguments, state)
        code = train(tuning)
        page.end(f"stopped by signal {code - 128}" if code else "complete")
        update_index(output)
    except (ValueError, OSError, HydraException, OmegaConfBaseException, yaml.YAMLError) as mistake:
        print(f"train_sft: {mistake_message(mistake)}", file=sys.stderr)
        return 2
    except FloatingPointError as fault:
        page.end(f"training failed: {fault}")
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
    if tuning.overfit and not tuning.overfit.passed:
        print(f"train_sft: {tuning.overfit}: more sft.steps, or what tools/why.py finds", file=sys.stderr)
        return 1
    print(f"written: {output}; take it out with tools/export_checkpoint.py {output} <folder>")
    if tuning.overfit:
        print(tuning.overfit)
    elif tuning.best.step:
        found = f"{tuning.best.loss:.4f} at step {tuning.best.step}"
        print(f"lowest held-out loss: {found}, in {output / BEST} (--version best)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
