"""A policy with its newest published parameters, answering batches of observations.

The policy server (serving.server) and the local policy (serving.local) own one. New parameters are made ready beside
those in use (`stage`, any thread, reads the disk) and are copied into their place between two batches (`swap`, on the
device), so that nobody waits for them. A file that is damaged or does not fit is reported and the last good version
goes on serving; at the start it is the newest whole one on disk.

    latest.json ─▶ stage: compare, read, copy to the device ─▶ [ one staged version, the newest ] ─▶ swap ─▶ act

A version that an operator pinned is served in place of the newest, older or not; where it cannot be, nothing else is
put in its place.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from serl_launcher.agents.build import build_policy
from serl_launcher.agents.choosing import best_chunks, candidates, reads_features, served_chunks
from serl_launcher.agents.steering import steer
from serl_launcher.policies.base import PolicyInput, Prefix, trainable
from serl_launcher.policies.compiling import check_switch
from serl_launcher.policies.kernels import AttentionCalls, pin_kernels
from serl_launcher.policies.precision import hold
from serl_launcher.policies.realtime import sample_realtime, soft_mask
from serl_launcher.run.parameters import base_sha256, checked_tensors
from serl_launcher.run.versions import PublishedVersion, file_path, newest_whole, problem_of
from serl_launcher.serving.graphs import GraphRunner, bucket_of, bucket_sizes
from serl_launcher.serving.query import Query
from serl_launcher.serving.upload import Upload
from serl_transport.contract.specs import TaskSpec, all_finite

log = logging.getLogger("policy")


@dataclass(frozen=True, slots=True)
class Staged:
    """A version that is ready to take over."""

    version: int
    tensors: dict[str, Tensor]  # of the policy's shapes, dtypes and device


class PolicyEngine:
    """Serves a policy from a params folder. pinned: the version that an operator pinned; None: the newest is served."""

    def __init__(self, cfg: DictConfig, params_dir: Path, pinned: Callable[[], int | None] = lambda: None) -> None:
        torch.set_num_threads(cfg.serving.threads)
        wanted = cfg.serving.device
        self.device = torch.device(
            "cuda" if wanted == "auto" and torch.cuda.is_available() else "cpu" if wanted == "auto" else wanted
        )
        pin_kernels(self.device)
        self.spec = TaskSpec.from_dict(OmegaConf.to_container(cfg.task.spec, resolve=True))
        self.policy = build_policy(cfg, self.spec).eval()
        self._base = base_sha256(self.policy)
        # Cast on the host: the device never holds, nor is sent, what trains in float32. It gets a tensor at a time.
        hold(self.policy, getattr(self.policy, "precision", "float32"), masters=False)
        self.policy.to(self.device)
        self._published = trainable(self.policy)
        self.policy.requires_grad_(False)  # guidance differentiates by actions, never by weights
        self.policy.fuse_for_serving()
        self._upload = Upload(self.device) if self.device.type == "cuda" else None
        self._params_dir, self._steps = params_dir, cfg.serving.flow_steps
        self._pinned = pinned
        self.pin: int | None = None  # as it was last asked for
        self._noise = torch.Generator().manual_seed(cfg.seed)
        self._sizes = bucket_sizes(cfg.serving.max_batch)
        self._graphs = self._graph_runner(cfg.serving.get("cuda_graphs", "auto"))
        self._seen: PublishedVersion | None = None  # the newest that was told of
        self._ready: PublishedVersion | None = None  # the last that was staged
        self._refused = -1
        self._staged: deque[Staged] = deque(maxlen=1)  # a newer one replaces it; safe between threads
        self.version = -1
        self.trouble: str | None = None  # why the newest version is not served, for people

    def _graph_runner(self, switch: Any) -> GraphRunner | None:
        """Graphs where they are wanted. Raises ValueError when they cannot be had."""
        mode = check_switch("serving.cuda_graphs", switch)
        if mode == "on" and self.device.type != "cuda":
            raise ValueError(f"serving.cuda_graphs=on: needs serving.device=cuda, got {self.device.type}")
        return GraphRunner(self._forward) if mode != "off" and self.device.type == "cuda" else None

    def warm_up(self) -> None:
        """Say which attention kernels answer, and capture a graph for every bucket of the task's own prompt, to keep;
        nothing without graphs."""
        if self._graphs is None:
            return
        started, spec = time.monotonic(), self.spec
        images = {camera: np.zeros((h, w, 3), np.uint8) for camera, (h, w) in spec.cameras.items()}
        query = Query(images, np.zeros(len(spec.state_names), np.float32), spec.prompt, seed=0)
        try:
            self._say_kernels(query)
            for size in self._sizes:
                self.act([query] * size)
        except Exception:  # a question that fails the same way gets its own error
            log.exception("warming up failed; the first questions will be slower, or fail as this did")
        self._graphs.keep()
        seconds = time.monotonic() - started
        log.info("%d CUDA graphs for batches of %s in %.1f s", self._graphs.captured, self._sizes, seconds)

    def _say_kernels(self, query: Query) -> None:
        """Run one answer outside of graphs and compiled code, where its attention calls can be watched."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), AttentionCalls() as calls:
            self._forward(self._inputs([query], self._draw([query])))
        calls.say()

    # Parameters.

    def refresh(self) -> bool:
        """Stage and swap at once; True when the served version changed."""
        self.stage()
        return self.swap()

    def stage(self) -> bool:
        """Make the pinned or the newest whole version ready, if it is new; True when it is.

        One thread at a time, any thread.
        """
        if (pin := self._pinned()) != self.pin:
            self.pin, self._seen, self._ready, self.trouble = pin, None, None, None
            if pin is not None:
                return self._stage_pinned(pin)
        if pin is not None:
            return False
        told = PublishedVersion.read(self._params_dir)
        if told is None or told == self._seen:
            return False
        self._seen = told
        newest = newest_whole(self._params_dir)
        if newest is None or newest.version < told.version:
            self._refused = told.version
        if newest is None or newest == self._ready:
            return False
        try:
            self.stage_file(self._params_dir / newest.file, newest.version)
        except (ValueError, OSError) as problem:
            self._refused = newest.version
            log.error("version %d refused, serving %d on: %s", newest.version, self.version, problem)
            self.trouble = f"version {newest.version} is refused: {problem}"
            return False
        self._ready, self.trouble = newest, None
        return True

    def _stage_pinned(self, version: int) -> bool:
        try:
            if problem := problem_of(self._params_dir, version):
                raise ValueError(problem)
            self.stage_file(file_path(self._params_dir, version), version)
        except (ValueError, OSError) as problem:
            log.error("version %d is pinned and cannot be served, serving %d on: %s", version, self.version, problem)
            self.trouble = f"version {version} is pinned and cannot be served: {problem}"
            return False
        return True

    def stage_file(self, path: Path, version: int) -> None:
        """Make this file ready as `version`. Raises ValueError that names what does not fit."""
        self._staged.append(Staged(version, checked_tensors(self._published, path, self._base, self._upload)[0]))

    def swap(self) -> bool:
        """Serve what is staged from the next batch on; True when there was something. Where `act` is called."""
        try:
            staged = self._staged.pop()
        except IndexError:
            return False
        # In place: captured graphs and compiled code read the weights where they lie.
        with torch.no_grad():
            torch._foreach_copy_(list(self._published.values()), [staged.tensors[name] for name in self._published])
        self.version = staged.version
        return True

    def will_serve(self, version: int) -> bool:
        """Whether `version` or a newer one, or the pinned one, is published and on its way here."""
        if self.pin is not None:
            return self.trouble is None
        newest = PublishedVersion.read(self._params_dir)
        return newest is not None and newest.version >= version and newest.version != self._refused

    # Actions.

    def act(self, queries: Sequence[Query]) -> list[np.ndarray]:
        """One answer a query: float32[ah, ad], or float32[n, ah, ad] where `samples` is given; physical, in limits.

        Each observation is encoded once, however many chunks are made of it.
        """
        if self._graphs is not None and all(_is_plain(query) for query in queries):
            size = bucket_of(len(queries), self._sizes)
            if size is not None:
                return self._act_by_graph(queries, size)
        guided = [row for row, query in enumerate(queries) if query.prefix_actions is not None]
        plain = [row for row, query in enumerate(queries) if query.prefix_actions is None]
        # Tensors of inference mode cannot be differentiated through later, as guidance must.
        with torch.no_grad() if guided else torch.inference_mode():
            prefix = self.policy.encode(self._observation(queries), features=reads_features(self.policy))
            answers: dict[int, np.ndarray] = {}
            for rows, make in ((plain, self._sample), (guided, self._sample_guided)):
                if rows:
                    part, asked = prefix.take(self._index(queries, rows)), [queries[row] for row in rows]
                    answers.update(zip(rows, self._physical(make(part, asked), part.anchor, asked), strict=True))
        return [answers[row] for row in range(len(queries))]

    def check_device(self) -> None:
        """Raises where the device fails whatever it is asked: an error of CUDA that only a new process gets rid of."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _act_by_graph(self, queries: Sequence[Query], size: int) -> list[np.ndarray]:
        """One chunk a query, the batch filled up to `size` by its last query."""
        filled = [*queries, *[queries[-1]] * (size - len(queries))]
        noise = self._draw(queries)
        with torch.inference_mode():
            last = noise[-candidates(self.policy) :]
            inputs = self._inputs(filled, torch.cat([noise, last.repeat(size - len(queries), 1, 1)]))
            chunks, anchor = self._graphs(inputs)[: len(queries)], inputs.get("anchor")
            return self._physical(chunks, None if anchor is None else anchor[: len(queries)], queries)

    def _inputs(self, queries: Sequence[Query], noise: Tensor) -> dict[str, Tensor]:
        return self.policy.prepare(self._observation(queries)) | {"noise": noise}

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """What a graph holds: prepared inputs and noise to chunks in the model's units."""
        tensors = {name: x for name, x in inputs.items() if name != "noise"}
        prefix = self.policy.encode_prepared(tensors, features=reads_features(self.policy))
        return served_chunks(self.policy, prefix, inputs["noise"], self._steps)

    def _observation(self, queries: Sequence[Query]) -> PolicyInput:
        return PolicyInput(
            images={camera: np.stack([q.images[camera] for q in queries]) for camera in self.spec.cameras},
            state=np.stack([q.state for q in queries]),
            prompts=[q.prompt for q in queries],
        )

    def _index(self, queries: Sequence[Query], rows: Sequence[int]) -> Tensor:
        return torch.tensor([row for row in rows for _ in range(queries[row].rows)], device=self.device)

    def _sample(self, prefix: Prefix, queries: Sequence[Query]) -> Tensor:
        return served_chunks(self.policy, prefix, self._draw(queries), self._steps)

    def _sample_guided(self, prefix: Prefix, queries: Sequence[Query]) -> Tensor:
        n = candidates(self.policy)
        noise = self._draw(queries)
        noise = steer(self.policy, prefix, noise) if n == 1 else noise
        known, mask = torch.zeros_like(noise), torch.zeros_like(noise)
        row = 0
        for query in queries:
            running = torch.tensor(query.prefix_actions, device=self.device)[: noise.shape[1]]
            k, robot = running.shape
            weights = soft_mask(query.inference_delay, k, noise.shape[1]).to(self.device)
            for _ in range(query.rows * n):
                # The running chunk is absolute: to the new one it is relative to the state that this one is asked at.
                anchor = None if prefix.anchor is None else prefix.anchor[row // n]
                known[row, :k] = self.policy.normalise_actions(running, anchor)
                mask[row, :, :robot] = weights[:, None]
                row += 1
        chunks = sample_realtime(self.policy, prefix.repeat(n), noise, self._steps, known, mask)
        return best_chunks(self.policy, prefix, chunks)

    def _physical(self, chunks: Tensor, anchor: Tensor | None, queries: Sequence[Query]) -> list[np.ndarray]:
        actions = self.policy.physical_actions(chunks, anchor).float().cpu().numpy()
        if not all_finite(actions):
            raise FloatingPointError("the policy made actions that are NaN or infinite")
        parts = np.split(actions, np.cumsum([query.rows for query in queries])[:-1])
        return [part[0] if query.samples is None else part for part, query in zip(parts, queries, strict=True)]

    def _draw(self, queries: Sequence[Query]) -> Tensor:
        """Noise float32[rows · candidates, ah, ad]: of its own generator where a query has a seed."""
        shape = self.policy.action_horizon, self.policy.action_dim
        noise = []
        for query in queries:
            generator = self._noise if query.seed is None else torch.Generator().manual_seed(query.seed)
            # Row by row: torch draws a large tensor in another order, and sample k must not depend on n.
            noise += [torch.randn(shape, generator=generator) for _ in range(query.rows * candidates(self.policy))]
        return torch.stack(noise).to(self.device)


def _is_plain(query: Query) -> bool:
    """One chunk, not guided by a running one."""
    return query.samples is None and query.prefix_actions is None
