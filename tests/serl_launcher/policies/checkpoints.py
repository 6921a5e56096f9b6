"""A task, sizes and an offline tokenizer for the checkpoint tests."""

from pathlib import Path

import numpy as np
import torch

from serl_launcher.policies.base import PolicyInput
from serl_launcher.policies.pi0.build import build_pi0, build_pi05
from serl_launcher.policies.pi0.tiny import TinyPI05Size, TinySize
from serl_transport.contract.specs import TaskSpec

B, AH = 2, 4
BUILD = {"pi0": build_pi0, "pi05": build_pi05}
VOCABULARY = 512
SHAPE = dict(width=16, expert_width=32, vision_width=16, image_size=32, conv_stem=False, vocabulary=VOCABULARY)
SIZE = {"pi0": TinySize(prompt_tokens=32, **SHAPE), "pi05": TinyPI05Size(prompt_tokens=64, **SHAPE)}
SPEC = TaskSpec.from_dict(
    {
        "name": "t",
        "prompt": "pick up the red cube",
        "cameras": {"front": [48, 64], "wrist": [32, 32]},
        "state_names": ["a", "b", "c"],
        "state_low": [-1, -1, 0],
        "state_high": [1, 1, 2],
        "action_names": ["x", "g"],
        "action_low": [-0.02, -1],
        "action_high": [0.02, 1],
        "control_hz": 10,
        "max_ticks": 60,
    }
)


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE in Hugging Face's format; nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["pick up the red cube\n"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def random_policy(kind: str, tokenizer: Path, **options):
    return BUILD[kind](kind, SPEC, "random", 0, AH, SIZE[kind], tokenizer=str(tokenizer), **options)


def loaded_policy(kind: str, folder: Path, **options):
    return BUILD[kind](kind, SPEC, "checkpoint", 0, None, SIZE[kind], checkpoint=str(folder), **options)


def observation(seed: int = 0) -> PolicyInput:
    rng = np.random.default_rng(seed)
    images = {c: rng.integers(0, 256, (B, *hw, 3), dtype=np.uint8) for c, hw in SPEC.cameras.items()}
    return PolicyInput(images, rng.uniform(-1, 1, (B, 3)).astype(np.float32), ["pick up the red cube", "lift"])


def lerobot_batch(given: PolicyInput) -> dict:
    """The same observation as LeRobot's preprocessors take it."""
    batch = {f"observation.images.{c}": torch.as_tensor(x).permute(0, 3, 1, 2) / 255 for c, x in given.images.items()}
    return batch | {"observation.state": torch.as_tensor(given.state), "task": list(given.prompts)}
