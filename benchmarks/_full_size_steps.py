"""The steps of benchmarks/full_size.py, each run by it in a process of its own: `run_step(name, place)`.

A place is a model's folder: base/ (the checkpoint that the run starts from), run/ (config.yaml, checkpoints, params),
export/, chunks (*.npy). Every step returns what it found; seconds and memory are measured around it.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _released_checkpoint import HORIZON, make_checkpoint
from accelerate import Accelerator  # noqa: F401  what a step imports must be there before memory is measured
from export_checkpoint import export
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import load_config
from serl_launcher.agents.build import build_policy
from serl_launcher.learner.learner import Learner
from serl_launcher.learner.publisher import Publisher
from serl_launcher.learner.resume import TrainerCheckpoints
from serl_launcher.learner.stage import StageProgress, StageSettings
from serl_launcher.learner.wiring import build_learner
from serl_launcher.policies.base import FlowPolicy
from serl_launcher.policies.estimate import Estimate, estimate, meta_policy
from serl_launcher.replay.views import ChunkBatch
from serl_launcher.run.config import read_config, task_spec
from serl_launcher.run.paths import RunPaths
from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import Query
from serl_transport.contract.specs import TaskSpec

STEPS = 3
GB = 1e9


class Place:
    """Folders of one model, and what the run in it is configured to."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.base, self.export = folder / "base", folder / "export"
        self.paths = RunPaths(folder / "run")

    @property
    def cfg(self) -> DictConfig:
        return read_config(self.paths.config)


def make(place: Place, words: list[str]) -> dict[str, Any]:
    """The checkpoint, as a release has it."""
    cfg = load_config(words)
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
    horizon = cfg.policy.action_horizon or HORIZON[place.kind]
    make_checkpoint(place.kind, instantiate(cfg.policy.size), spec, horizon, place.base)
    return {"file_gb": sum(f.stat().st_size for f in place.base.glob("model*.safetensors")) / GB}


def plan(place: Place, words: list[str], modes: list[str], gb: float) -> dict[str, Any]:
    """The run's config.yaml, as a start writes it, of the first mode that fits into `gb` by preflight's forecast."""
    needed = {}
    for mode in modes:
        cfg = load_config(
            [*words, f"++policy.train={mode}", "policy.init=checkpoint", f"++policy.checkpoint={place.base}"]
        )
        cost = cost_of(cfg)
        needed[mode] = round(max(cost.loading, cost.training, cost.serving) / GB, 1)
        if needed[mode] <= gb:
            place.paths.root.mkdir(parents=True)
            place.paths.config.write_text(OmegaConf.to_yaml(cfg, resolve=True))
            figures = asdict(cost) | {"training": cost.training, "resting": cost.resting, "serving": cost.serving}
            return {"train": mode, "needed_gb": needed, "forecast": figures}
    raise MemoryError(f"no way of training it fits into {gb:g} GB: {needed}")


def cost_of(cfg: DictConfig) -> Estimate:
    """Costs of a run's policy in its batches."""
    spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
    policy, _ = meta_policy(cfg.policy, spec, instantiate(cfg.policy.size))
    batches = dict(batch=cfg.trainer.batch_size, questions=cfg.serving.max_batch)
    return estimate(policy, spec, cfg.serving.flow_steps, noise_samples=cfg.algo.agent.noise_samples, **batches)


def load(place: Place) -> dict[str, Any]:
    """The policy as a trainer holds it."""
    return {"report": str(build_policy(place.cfg, task_spec(place.cfg)).load_report)}


def train(place: Place) -> dict[str, Any]:
    """Three steps of the learner, then its checkpoint."""
    policy, learner, _, checkpoints = trainer(place)
    seconds, losses = [], []
    for step in range(STEPS):
        began = time.perf_counter()
        metrics = learner.step(batch(place.cfg, policy, step), 1.0)
        seconds.append(round(time.perf_counter() - began, 2))
        losses.append(round(float(metrics["losses/flow"]), 5))
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"losses of three steps: {losses}")
    checkpoints.save()
    return {"losses": losses, "step_s": seconds, "batch": place.cfg.trainer.batch_size}


def publish(place: Place) -> dict[str, Any]:
    """A trainer that starts again: it resumes from the checkpoint and publishes a version."""
    _, learner, publisher, checkpoints = trainer(place)
    checkpoints.resume(None)
    publisher.publish()
    publisher.check_frozen()
    (file,) = place.paths.params.glob("v*.safetensors")
    return {"trained_steps": learner.step_count, "version": publisher.version, "file_gb": file.stat().st_size / GB}


def serve(place: Place) -> dict[str, Any]:
    """A chunk of the published version, from the policy server's engine."""
    engine = PolicyEngine(place.cfg, place.paths.params)
    if not engine.refresh():
        raise RuntimeError(f"the published version is not served: {engine.trouble}")
    (file,) = place.paths.params.glob("v*.safetensors")
    engine.stage_file(file, engine.version)  # as beside the answers of a run
    chunk, seconds = answer(engine)
    engine.swap()
    np.save(place.folder / "published.npy", chunk)
    return {"version": engine.version, "answer_s": seconds}


def export_run(place: Place) -> dict[str, Any]:
    """The run's policy as a checkpoint folder, by the tool."""
    export(place.paths.root, place.export)
    return {"file_gb": sum(f.stat().st_size for f in place.export.glob("model*.safetensors")) / GB}


def reload(place: Place) -> dict[str, Any]:
    """A chunk of the exported folder; how far it is from the published version's, in shares of the action range."""
    cfg = place.cfg
    cfg.policy.checkpoint = str(place.export)
    chunk, seconds = answer(PolicyEngine(cfg, place.folder / "no_versions"))
    spec, published = task_spec(cfg), np.load(place.folder / "published.npy")
    reach = np.subtract(spec.action_high, spec.action_low)
    spread = float((np.ptp(chunk.reshape(-1, chunk.shape[-1]), 0) / reach).max())
    return {
        "answer_s": seconds,
        "equal": bool(np.array_equal(chunk, published)),
        "difference": float((np.abs(chunk - published) / reach).max()),
        "spread": spread,  # a chunk that is the same everywhere would equal anything
    }


ACT: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "plan": plan,
    "load": load,
    "train": train,
    "publish": publish,
    "serve": serve,
    "export": export_run,
    "reload": reload,
}


def trainer(place: Place) -> tuple[FlowPolicy, Learner, Publisher, TrainerCheckpoints]:
    """What learner.wiring puts together for a trainer, without gateway and replay."""
    cfg, paths = place.cfg, place.paths
    torch.set_num_threads(cfg.trainer.threads)
    torch.manual_seed(cfg.seed)
    spec, settings = task_spec(cfg), cfg.trainer
    policy = build_policy(cfg, spec)
    learner = build_learner(cfg, policy, spec)
    rates = (settings.warmup_steps, settings.final_lr_scale, settings.online_lr_scale, settings.max_steps_per_tick)
    publisher = Publisher(paths.params, learner, policy, name=cfg.policy.name, keep=1)
    rng = np.random.default_rng(cfg.seed)
    stages = StageProgress(StageSettings(*rates))
    return policy, learner, publisher, TrainerCheckpoints(paths.checkpoints, learner, stages, publisher, rng, keep=1)


def batch(cfg: DictConfig, policy: FlowPolicy, seed: int) -> ChunkBatch:
    """Random pictures, states and chunks inside the task's limits."""
    spec, b, rng = task_spec(cfg), cfg.trainer.batch_size, np.random.default_rng(seed)
    shape = (b, policy.action_horizon, len(spec.action_names))
    return ChunkBatch(
        images={c: rng.integers(0, 256, (b, *hw, 3), dtype=np.uint8) for c, hw in spec.cameras.items()},
        state=rng.uniform(spec.state_low, spec.state_high, (b, len(spec.state_names))).astype(np.float32),
        action=rng.uniform(spec.action_low, spec.action_high, shape).astype(np.float32),
        is_pad=np.zeros(shape[:2], bool),
        demo=np.ones(b, bool),
        operator=np.zeros(b, bool),
        weight=np.ones(b, np.float32),
        prompts=[spec.prompt] * b,
    )


def answer(engine: PolicyEngine) -> tuple[np.ndarray, float]:
    """float32[ah, ad] for one seeded observation, and the seconds it took."""
    spec, rng = engine.spec, np.random.default_rng(0)
    images = {c: rng.integers(0, 256, (*hw, 3), dtype=np.uint8) for c, hw in spec.cameras.items()}
    state = rng.uniform(spec.state_low, spec.state_high).astype(np.float32)
    began = time.perf_counter()
    (chunk,) = engine.act([Query(images, state, spec.prompt, seed=0)])
    return chunk, round(time.perf_counter() - began, 2)


def run_step(name: str, place: Place, **given: Any) -> dict[str, Any]:
    """One step: what it found, its seconds, and the memory that it took beyond interpreter and libraries."""
    import_library(place.kind)
    before, began = settle(), time.perf_counter()
    found = ACT[name](place, **given)
    seconds = round(time.perf_counter() - began, 1)
    return found | {"seconds": seconds, "rss_gb": (status("VmHWM") - before) / GB, "libraries_gb": before / GB}


def import_library(kind: str) -> None:
    """What the model's classes and a training step import, before memory is measured."""
    from transformers import AutoTokenizer  # noqa: F401

    if kind == "groot_n1_7":
        import lerobot.policies.groot.groot_n1_7
        import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
    else:
        import lerobot.policies.pi0.modeling_pi0
        import lerobot.policies.pi05.modeling_pi05  # noqa: F401
    layer = torch.nn.Linear(1, 1)  # the first step of an optimizer imports the compiler
    layer(torch.ones(1, 1)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def settle() -> int:
    """Bytes of the process as it is; its highest mark begins anew here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024
