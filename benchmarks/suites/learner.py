"""What the trainer costs around a step, and what publishing and saving hold it up, at the step times of a GPU.

The real trainer over the real ring, its pictures 3 × 224², batch 64; the learner's step is a wait, as the host's is
while a GPU works, and what is written are parameters of the size that is named. Overhead is the share of time outside
the waits; stall is the share in which versions and checkpoints held training up, at the default periods: they do where
the one before is not written yet, so that a slow disk shows.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rows import Row
from suites.replay import BATCH, filled, spec

from flowserl_cli.compose import load_config
from serl_launcher.learner.stage import TrainingStage
from serl_launcher.learner.trainer import Trainer
from serl_launcher.learner.wiring import build_trainer
from serl_launcher.run.paths import RunPaths

STEP_S = 0.16  # PI0's expert-only step at batch 32 on an H100, by docs/performance.md
PUBLISH, SAVE = 100, 300  # steps, config/base.yaml
STATE_MB = 100  # of parameters; a checkpoint has four times that


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    torch.set_num_threads(1)
    periods, megabytes = ((20, 60), 4) if quick else ((PUBLISH, SAVE), STATE_MB)
    with tempfile.TemporaryDirectory() as folder:
        ring = filled(Path(folder), 4)
        try:
            trainer = trainer_of(Path(folder) / "run", *periods)
            trainer.data.refresh(str(ring.path))
            simulate(trainer, megabytes)
            yield from measured(trainer, *periods, megabytes)
        finally:
            ring.close()


def trainer_of(root: Path, publish: int, save: int) -> Trainer:
    """The default trainer, for the replay suite's task; nothing but its pictures are large."""
    words = ["algo=sac_pi0", "trainer.device=cpu", f"trainer.batch_size={BATCH}", "telemetry.tensorboard=false"]
    words += [f"trainer.publish_period={publish}", f"trainer.checkpoint_period={save}", "algo.min_accepted=0"]
    cfg = load_config(words)
    cfg.task.spec = spec().to_dict()
    paths = RunPaths(root)
    for made in (paths.params, paths.checkpoints):
        made.mkdir(parents=True)
    return build_trainer(cfg, paths, gateway=None)


def simulate(trainer: Trainer, megabytes: int) -> None:
    """A step that waits, over a state of so much for each of parameters, average and the optimizer's two moments."""
    learner = trainer.learner
    state = {f"layer{k}": torch.zeros(megabytes << 16) for k in range(4)}
    moments = {k: {"exp_avg": x.clone(), "exp_avg_sq": x.clone()} for k, x in enumerate(state.values())}

    def step(batch: object, lr_scale: float) -> dict[str, float]:
        time.sleep(STEP_S)
        learner.step_count += 1
        return {}

    learner.step = step
    trainer.data._prepare = lambda batch: batch  # a GPU's own work
    learner.tensors = lambda: {f"raw.{n}": x for n, x in state.items()} | {f"averaged.{n}": x for n, x in state.items()}
    learner.optimizer_state = lambda: {"policy": {"state": moments, "param_groups": []}}
    type(learner).averaged = property(lambda self: state)


def measured(trainer: Trainer, publish: int, save: int, megabytes: int) -> Iterator[Row]:
    """Shares of the time between two checkpoints; the first version and checkpoint, which make the copies' memory, are
    written before."""
    stage, stalls, steps = TrainingStage("s", "train", 10**9), [], save
    trainer.learner.step_count = save - 1
    trainer.take_step(stage, 0)
    trainer.disk.finish()
    began = time.perf_counter()
    for _ in range(steps):
        trainer.take_step(stage, 0)
        if trainer.learner.step_count % publish == 0:
            stalls.append(trainer.disk.stall_s)
    took = time.perf_counter() - began
    trainer.disk.finish()
    trainer.end()
    name = f"step_{1e3 * STEP_S:g}ms"
    yield Row.of(f"learner/outside_the_step/{name}", 1 - steps * STEP_S / took, "of the time", goal="<= 0.03")
    yield Row.of(f"learner/stall_of_writing/{megabytes}MB/{name}", sum(stalls) / took, "of the time", goal="<= 0.01")
    for kind, seconds in trainer.disk.took_s.items():
        yield Row.of(f"learner/written_meanwhile/{kind}", seconds, "s")
