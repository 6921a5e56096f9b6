"""A checkpoint folder as a release has it, with random weights: config, weights, processors, statistics, tokenizer.

benchmarks/full_size.py makes one of each head. Nothing is fetched, and weights are drawn as they are written, so that
no more than a tensor of it is in memory. PI0 and PI0.5 are one file in fp32 whose embedding has the name of the tied
language head, GR00T N1.7 is in NVIDIA's layout in bf16, in shards of 5 GB. Tokenizers are made here: bytes as tokens,
and Qwen's special tokens at their released places.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serl_launcher.policies.groot.checkpoint import ALIASES as GROOT_ALIASES
from serl_launcher.policies.groot.head import GrootFlowPolicy
from serl_launcher.policies.groot.inputs import QwenInputs
from serl_launcher.policies.groot.saving import write_sidecars
from serl_launcher.policies.pi0.checkpoint import ALIASES, EMBEDDING
from serl_launcher.policies.pi0.head import PI0FlowPolicy
from serl_launcher.policies.pi0.pi05 import PI05FlowPolicy
from serl_launcher.policies.pi0.saving import language_heads, write_config
from serl_launcher.policies.saving import SHARD, new_folder, tensors_to_save, write_model
from serl_launcher.policies.tokens import HubTokenizer
from serl_launcher.tensor_files import Pending
from serl_transport.contract.specs import TaskSpec

HEADS = {"pi0": PI0FlowPolicy, "pi05": PI05FlowPolicy}
BLOCK = 1_048_583  # a prime, so that no row of a matrix is another one
HORIZON = {"pi0": 50, "pi05": 50, "groot_n1_7": 40}  # ticks of a released chunk
QWEN = {  # id of a token in Qwen3-VL's vocabulary
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)


def make_checkpoint(kind: str, size: Any, spec: TaskSpec, horizon: int, folder: Path) -> None:
    """kind: pi0, pi05 or groot_n1_7; size: of the config's `policy.size`; folder: must be new."""
    with new_folder(folder) as part:
        if kind in HEADS:
            _pi0(HEADS[kind], size, spec, horizon, part)
        else:
            _groot(size, spec, horizon, part)


def _pi0(head: type[PI0FlowPolicy], size: Any, spec: TaskSpec, horizon: int, folder: Path) -> None:
    config = size.config(spec, horizon)
    byte_tokenizer(["<pad>", "<eos>", "<bos>", "<unk>"]).save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        core = size.build(config)
    words = HubTokenizer(str(folder / "tokenizer"), config.tokenizer_max_length)
    policy = head(core, spec, words, attention="sdpa")
    heads = {f"model.{name}": tensor for name, tensor in language_heads(core).items()}
    tensors = tensors_to_save(policy, "model.", ALIASES) | heads
    del tensors[f"model.{EMBEDDING}"]  # a release has it under the name of the language head
    write_config(policy, folder)
    write_model({name: _drawn(name, pending, torch.float32) for name, pending in tensors.items()}, folder)


def _groot(size: Any, spec: TaskSpec, horizon: int, folder: Path) -> None:
    with torch.device("meta"):
        core = size.build(size.config_fields(spec, horizon))
    inputs = size.inputs(tuple(spec.cameras))
    if not size.hashed:
        processor = _qwen(folder / "processor")
        inputs = QwenInputs(str(processor), tuple(spec.cameras), size.geometry())
    policy = GrootFlowPolicy(core, spec, inputs)
    tensors = tensors_to_save(policy, "", GROOT_ALIASES)
    write_model({name: _drawn(name, pending, torch.bfloat16) for name, pending in tensors.items()}, folder, SHARD)
    write_sidecars(policy, folder, policy.embodiment_tag)


def _qwen(folder: Path) -> Path:
    from transformers import Qwen2VLImageProcessor

    tokenizer = byte_tokenizer(list(QWEN), QWEN)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, **shape).save_pretrained(folder)
    return folder


def byte_tokenizer(special: list[str], places: dict[str, int] | None = None) -> Any:
    """Bytes as tokens, in Hugging Face's format; padding is the first special token, the end the second.

    places: ids of the special tokens, unused ones below them; None: they come first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if places is None:
        vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    else:
        vocabulary = {token: number for number, token in enumerate(alphabet)} | places
        spare = set(range(max(places.values()))) - set(vocabulary.values())
        vocabulary |= {f"<|unused_{number}|>": number for number in spare}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=special[0], eos_token=special[1])


def _drawn(name: str, pending: Pending, dtype: torch.dtype) -> Pending:
    """The same tensor with numbers of its own, always the same for a name."""
    return replace(pending, dtype=dtype, make=partial(_draw, name, pending.shape, dtype))


def _draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Matrices keep the size of what they are multiplied with; norms do nothing, biases are zero."""
    if len(shape) < 2:
        gemma = ".paligemma.model.language_model." in name or ".gemma_expert." in name  # scales by 1 + weight
        zero = name.endswith("bias") or gemma
        return (torch.zeros if zero else torch.ones)(shape, dtype=dtype)
    # Weights by embodiment are [slot, in, out], the others [out, in, ...].
    by_slot = len(shape) == 3 and "action_head." in name
    inputs = shape[1] if by_slot else math.prod(shape[1:])
    out, block = torch.empty(math.prod(shape)), _block().roll(zlib.crc32(name.encode()) % BLOCK)
    for part in out.split(BLOCK):
        torch.mul(block[: len(part)], inputs**-0.5, out=part)
    return out.view(shape).to(dtype)


@cache
def _block() -> Tensor:
    """Normal numbers that every tensor repeats: drawing four billion would take longer than writing them."""
    return torch.empty(BLOCK).normal_(generator=torch.Generator().manual_seed(0))
