#!/usr/bin/env python
"""Will it fit, how long will a step take, and is the data right? Answered before any weight is loaded.

    python tools/preflight.py [--dataset DIR] [--gpu-gb 80] [--tflops 800] [--flow-steps 10] policy=pi0 task=pick ...

Takes the overrides of a run. Parameters, bytes and FLOPs are counted on the real classes without memory behind them;
step time assumes 45% of the peak. Exits 0; 1 when the batch does not fit or the data is wrong; 2 on a mistake.
"""

from __future__ import annotations

import needs_learner  # noqa: F401

import argparse
import sys
from pathlib import Path

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from flowserl_cli.compose import load_config
from serl_launcher.datasets.dataset import Dataset
from serl_launcher.datasets.source import Source, read_sources
from serl_launcher.learner.fit_check import unfit
from serl_launcher.learner.relative import measure
from serl_launcher.learner.settings_check import chunk_of, units_of_policy
from serl_launcher.policies.estimate import Estimate, estimate, meta_policy
from serl_launcher.policies.parameter_table import parameter_table
from serl_launcher.replay.ring_layout import RingError, place_ring
from serl_launcher.run.config import plain
from serl_launcher.supervisor.launch import ranks_here
from serl_transport.contract.specs import TaskSpec

PEAKS = {"H200": 800, "H100": 800, "A100": 280, "L40S": 330, "4090": 150, "3090": 65}  # dense bf16, reached, TFLOP/s
UTILISATION, USABLE = 0.45, 0.92  # of the peak; of the memory (fragmentation, CUDA's own)
GB = 1e9


def machine(args: argparse.Namespace) -> tuple[str, float | None, float | None]:
    """Name, memory in GB and peak in TFLOP/s: of this GPU, unless told otherwise; None where unknown."""
    name, memory, peak = "no GPU here", None, None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory / GB
        peak = next((tf for key, tf in PEAKS.items() if key in name), None)
    return name, args.gpu_gb or memory, args.tflops or peak


def cost_of(cfg: DictConfig, policy: nn.Module, spec: TaskSpec, flow_steps: int) -> Estimate:
    """Costs in the batches of a config; `policy` is held as the policy server's afterwards."""
    noise_samples, questions = cfg.algo.agent.get("noise_samples", 1), cfg.serving.max_batch
    served = dict(questions=questions, candidates=(cfg.algo.served or {}).get("candidates", 1))
    cost = estimate(policy, spec, flow_steps, batch=share(cfg), noise_samples=noise_samples, **served)
    return cost.of_rank(cfg.launch.engine, ranks_of(cfg))


def ranks_of(cfg: DictConfig) -> int:
    """Processes that train, on all machines."""
    return ranks_here(cfg) * cfg.launch.num_machines


def share(cfg: DictConfig) -> int:
    """Samples of a step on each device."""
    return cfg.trainer.batch_size // ranks_of(cfg)


def report(cfg: DictConfig, cost: Estimate, args: argparse.Namespace) -> tuple[list[str], bool]:
    """Lines on memory, batch and time, and whether the batch fits (True when memory is unknown)."""
    name, memory, peak = machine(args)
    engine, ranks, batch, questions = cfg.launch.engine, ranks_of(cfg), share(cfg), cfg.serving.max_batch
    lines = [
        f"machine    {name}" + (f", {memory:.0f} GB" if memory else "") + (f", {peak:g} TFLOP/s" if peak else ""),
        f"batch      {batch * ranks} samples a step"
        + (f" = {batch} on each of {ranks} ranks, {engine}; what follows is one rank's" if ranks > 1 else ""),
        f"loading    {cost.loading / GB:.2f} GB",
        f"training   {cost.training / GB:.2f} GB = {cost.weights / GB:.2f} weights + {cost.optimizer / GB:.2f} Adam, "
        f"average + {cost.step / GB:.2f} the step's own; {cost.sample / GB:.4f} for one more sample",
        f"serving    {cost.serving / GB:.2f} GB = {cost.served / GB:.2f} weights + {cost.staged / GB:.2f} staged copy "
        f"+ {cost.answer / GB:.2f} activations of {questions} questions",
    ]
    fits = True
    if memory:
        left = memory * USABLE * GB - cost.serving - cost.training
        largest = batch + int(left // max(1, cost.sample))
        fits = largest >= batch
        lines.append(
            f"largest    batch {max(0, largest * ranks)} beside the policy server on one device"
            + (f", {max(0, largest)} a rank; the server is beside rank 0 alone" if ranks > 1 else "")
        )
        if not fits:
            advice = "lower it, train=expert, checkpointing=true" + ("" if engine == "fsdp2" else " or launch=fsdp2")
            lines.append(f"           trainer.batch_size={batch} does NOT fit: {advice}")
    flops, serve = cost.train_flops * batch, cost.serve_flops
    lines.append(
        f"FLOPs      {flops / 1e12:.3f} T a training step, {serve / 1e12:.3f} T a chunk ({args.flow_steps} flow steps)"
    )
    if peak:
        reached = peak * 1e12 * UTILISATION
        lines.append(
            f"time       ~{flops / reached * 1e3:.1f} ms a step, ~{serve / reached * 1e3:.1f} ms of arithmetic a chunk"
        )
    return lines, fits


def replay_ring(cfg: DictConfig, spec: TaskSpec) -> str:
    """A line on where this machine would keep the replay ring."""
    runs = Path(cfg.runs_dir).absolute()
    folder = next(place for place in (runs, *runs.parents) if place.is_dir())
    shape = spec.cameras, spec.state_dim, spec.action_dim
    try:
        placing = place_ring(shape, cfg.replay.capacity_frames, folder, memory_share=cfg.replay.memory_share)
    except RingError as problem:
        return f"replay     does NOT fit on this machine: {problem}"
    return f"replay     on this machine: {placing.words}"


def look_at(source: Source, cfg: DictConfig, spec: TaskSpec) -> list[str]:
    """What keeps a dataset from being used for the task, and for a checkpoint's units; printed, with what is worth
    knowing of it."""
    notes: list[str] = []
    try:
        data = Dataset(source)
        found = data.fit(spec)
        problems, notes = found.problems, [f"note: {note}" for note in found.notes]
        if not problems and (cfg.policy.get("checkpoint") or cfg.policy.get("relative")):
            rows = data.rows(spec)
            if measure(cfg, rows, spec, chunk_of(cfg)):
                notes.append(f"note: measured: policy.relative={as_typed(cfg.policy.relative)}")
            problems = unfit(units_of_policy(cfg, spec), rows, spec, chunk_of(cfg) or 1)
    except ValueError as mistake:
        problems = [str(mistake)]
    print("data       " + "\n           ".join([*(problems or ["nothing wrong"]), *notes]))
    return problems


def as_typed(relative: DictConfig) -> str:
    """`policy.relative` as the command line takes it."""
    said = OmegaConf.to_container(relative, resolve=True)
    return "'{" + ", ".join(f"{key}: {value}" for key, value in said.items()).replace("'", "") + "}'"


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for a run: policy=pi0 trainer.batch_size=32")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a lab's own config folder (docs/your_lab.md)")
    parser.add_argument("--dataset", help="LeRobot dataset to check against the task: a folder or a hub name")
    parser.add_argument("--gpu-gb", type=float, help="memory of the device, default: this GPU's")
    parser.add_argument("--tflops", type=float, help="peak of the device, default: by this GPU's name")
    parser.add_argument("--flow-steps", type=int, help="default: of the head's release, 10 or 4")
    args = parser.parse_intermixed_args(argv)
    try:
        cfg = load_config([*args.overrides, *([f"--config-dir={args.config_dir}"] if args.config_dir else [])])
        spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
        policy, _ = meta_policy(cfg.policy, spec, instantiate(cfg.policy.size))
        if args.flow_steps is None:
            args.flow_steps = policy.released_flow_steps
        table = parameter_table(policy)
        cost = cost_of(cfg, policy, spec, args.flow_steps)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as mistake:
        print(f"preflight: {mistake}", file=sys.stderr)
        return 2
    lines, fits = report(cfg, cost, args)
    print(table, *lines, replay_ring(cfg, spec), sep="\n")
    sources = [*([Source(args.dataset)] if args.dataset else []), *read_sources(plain(cfg, "demos"))]
    wrong = [problem for source in sources for problem in look_at(source, cfg, spec)]
    return 0 if fits and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
