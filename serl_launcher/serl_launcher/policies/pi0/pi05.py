"""PI0.5 behind the flow-policy interface, over lerobot's own modules with our own forward path.

Against PI0: the state goes into the prompt as text ("State: 127 30 …", 256 bins over the normalised range), and the
flow time conditions every layer of the action expert (adaRMS). pi0.build makes it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from serl_launcher.policies.base import Prefix
from serl_launcher.policies.pi0.gemma import Modulation, modulations
from serl_launcher.policies.pi0.head import PI0FlowPolicy
from serl_launcher.policies.tokens import Tokenizer, within

BIN_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]  # as openpi and lerobot bin a state; below −1 is bin −1


class PI05FlowPolicy(PI0FlowPolicy):
    """lerobot's `PI05Pytorch` as a flow policy."""

    kind: ClassVar[str] = "pi05"
    statistics_mode: ClassVar[str] = "QUANTILES"
    states: ClassVar[int] = 0

    def _prompts(self, prompts: list[str], state: Tensor) -> tuple[list[str], int]:
        """Prompts with the state in them, padded as if every number in it were the widest: the length, and with it the
        shape that a CUDA graph or compiled code is made for, depends on the tasks' texts alone."""
        shapes_only = state.is_meta  # policies.estimate counts costs without numbers
        texts = [fitted(self.tokenizer, prompt, state.shape[-1]) for prompt in prompts]
        least = max(widest(self.tokenizer, text, state.shape[-1]) for text in set(texts))
        return state_prompts(texts, np.zeros(state.shape) if shapes_only else state.detach().cpu().numpy()), least

    def _library_step(self, prefix: Prefix, cache, x_tau: Tensor, tau: Tensor) -> Tensor:
        return self.core.denoise_step(prefix.pad_mask, cache, x_tau, tau)

    def _embed_time(self, tau: Tensor) -> Tensor:
        """What conditions the expert's norms: float32[m], to float32[m, width]."""
        core = self.core
        return F.silu(core.time_mlp_out(F.silu(core.time_mlp_in(self._time(tau)))))

    def _embed_actions(self, x_tau: Tensor, time: Tensor) -> Tensor:
        """The actions' tokens float32[b, ah, width], whatever the time."""
        return self.core.action_in_proj(x_tau)

    def _norms(self, time: Tensor) -> list[Modulation]:
        """adaRMS: scale, shift and gate of every norm."""
        return modulations(self.expert, self._stream(time))


@lru_cache(4096)
def fitted(tokenizer: Tokenizer, prompt: str, dims: int) -> str:
    """The task's text, cut so that the state behind it is read whole. ValueError when the state alone is too long."""
    behind = state_prompts([""], np.ones((1, dims)))[0].removeprefix("Task: ")  # bin 255 is the widest
    return within(tokenizer, "Task: ", cleaned(prompt), behind)


@lru_cache(4096)
def widest(tokenizer: Tokenizer, text: str, dims: int) -> int:
    """Tokens of the longest prompt that a task's text may become."""
    return tokenizer.count(state_prompts([text], np.ones((1, dims)))[0])


def cleaned(prompt: str) -> str:
    """As openpi and lerobot clean a task's text."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def state_prompts(prompts: list[str], state: np.ndarray) -> list[str]:
    """The text that PI0.5 was trained on: the task, then the state's bins. state: float32[b, s], normalised."""
    bins = np.digitize(state, BIN_EDGES) - 1
    return [
        f"Task: {cleaned(prompt)}, State: {' '.join(map(str, row))};\nAction: "
        for prompt, row in zip(prompts, bins, strict=True)
    ]
