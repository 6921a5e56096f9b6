"""Policies: the step and the sample of our forward path against LeRobot's, and what of the machine's peak is used.

On a CPU at a middle size (arithmetic dominates): an expert-only step against the library's joint path with equal
gradients, and n = 8 samples from one prefix against 8 calls. On a GPU the same at full size with random weights. Then
docs/performance.md's table for PI0 and GR00T N1.7 (suites._policy_table), at full size or, on a CPU, at the middle one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from rows import Row, alternate
from suites._apart import apart
from suites._policy_table import Model, Work, built, full_models, middle_models, seconds, table
from torch import Tensor, nn

from serl_launcher.policies import kernels
from serl_launcher.policies.base import sample
from serl_launcher.policies.pi0.tiny import TinySize


def rows(quick: bool) -> Iterator[Row]:
    """Every figure of the suite."""
    if torch.cuda.is_available():
        device, models = torch.device("cuda"), full_models()
        compare = partial(against_library, device, models[0], 2 if quick else 16, 1 if quick else 5)
        measured = table(device, models, (1, 4) if quick else (1, 32), 2 if quick else 10, "bfloat16")
    else:
        device, depth = torch.device("cpu"), 2 if quick else 6
        models = middle_models(middle(depth), depth)
        compare = partial(against_library, device, models[0], 4, 1 if quick else 5)
        measured = table(device, models, (1, 4), 1 if quick else 3, "float32")
    yield from apart("policy/against_library", compare)
    yield from measured


def middle(depth: int) -> TinySize:
    """Between tiny and full: a language model four times the expert's cost per token, as in the full model."""
    shape = dict(width=512, expert_width=256, head_dim=32, vision_width=256, vision_layers=depth, vision_heads=4)
    return TinySize(depth=depth, image_size=112, patch_size=14, prompt_tokens=16, conv_stem=False, **shape)


def against_library(device: torch.device, model: Model, batch: int, rounds: int) -> Iterator[Row]:
    """Ours against lerobot's joint forward (expert-only, fp32), and one prefix against eight. model: a PI0."""
    policy = built(device, model, "expert", "float32")
    work = Work.of(policy, model.spec, batch, device)
    with kernels.exact():  # TF32 alone would make them differ by 1e-3
        yield gradient_difference(*step_gradients(policy, work))
    found = alternate(
        {
            "ours": lambda: seconds(device, lambda: our_step(policy, work)),
            "joint": lambda: seconds(device, lambda: library_step(policy, work)),
        },
        rounds,
    )
    name = f"policy/expert_step/batch{batch}"
    yield Row.of(name, 1 / found["ours"], "steps/s", 1 / found["joint"], ">= 1.6")
    one = Work.of(policy, model.spec, 1, device)
    found = alternate(
        {
            "shared": lambda: seconds(device, lambda: draw(policy, one, 8)),
            "apart": lambda: seconds(device, lambda: [draw(policy, one, 1) for _ in range(8)]),
        },
        rounds,
    )
    yield Row.of("policy/samples8/one_prefix", 1 / found["shared"], "calls/s", 1 / found["apart"], ">= 3.0")
    yield from served_against_library(device, model, rounds)


def served_against_library(device: torch.device, model: Model, rounds: int) -> Iterator[Row]:
    """A chunk at batch 1 as it is served against lerobot's `sample_actions` of the same weights and noise, in fp32."""
    policy, library = (built(device, model, "expert", "float32").eval().requires_grad_(False) for _ in range(2))
    library.load_state_dict(policy.state_dict())
    policy.fuse_for_serving()
    one = Work.of(policy, model.spec, 1, device)
    given = library_inputs(library, one)

    def theirs() -> Tensor:
        return library.core.sample_actions(*given, noise=one.noise, num_steps=10)

    difference = (draw(policy, one, 1) - theirs()).abs().max().item()
    if difference > (1e-4 if device.type == "cpu" else 1e-1):
        raise AssertionError(f"chunks differ from the library's by {difference:.2e}")
    yield Row.of("policy/chunk/difference", difference, "model's units")
    calls = {"ours": lambda: draw(policy, one, 1), "library": theirs}
    found = alternate({name: partial(seconds, device, call) for name, call in calls.items()}, rounds)
    yield Row.of("policy/chunk/batch1", 1 / found["ours"], "calls/s", 1 / found["library"], ">= 1.5")


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Row:
    """The largest difference of a parameter's gradients, against their largest value."""
    name = "policy/expert_step/gradient_difference"
    if ours.keys() != theirs.keys():
        return Row.failed(name, f"failed: gradients of other parameters: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    worst = max((ours[n] - theirs[n]).abs().max().item() / (theirs[n].abs().max().item() + 1e-8) for n in theirs)
    return Row.of(name, worst, "of the largest", goal="<= 0.001")


def our_step(policy: nn.Module, work: Work) -> None:
    """Forward and backward of our path."""
    policy.zero_grad(set_to_none=True)
    work.loss(policy).backward()


def library_step(policy: nn.Module, work: Work) -> None:
    """Forward and backward of lerobot's joint path, its loss cut to the robot's dims as its policy does."""
    policy.zero_grad(set_to_none=True)
    loss = policy.core(*library_inputs(policy, work), work.chunk, work.noise, 1 - work.t)
    loss[..., : policy.robot_dim].mean().backward()


def library_inputs(policy: nn.Module, work: Work) -> tuple:
    """Pictures, which of them are there, ids, their mask and the state, as lerobot's core takes them."""
    b = len(work.observation)
    images = list(policy._pixels(work.observation.images).split(b))
    device = work.t.device
    ids, mask = (x.to(device) for x in policy.tokenizer(*policy._prompts(work.observation.prompts, None)))
    state = policy.state_units.to_model(torch.as_tensor(work.observation.state, device=device))
    state = torch.nn.functional.pad(state, (0, policy.core.config.max_state_dim - state.shape[-1]))
    present = [torch.ones(b, dtype=torch.bool, device=device)] * len(images)
    return images, present, ids, mask, state


def step_gradients(policy: nn.Module, work: Work) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of both paths for the same noise and times."""
    found = []
    for step in (our_step, library_step):
        step(policy, work)
        found.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    policy.zero_grad(set_to_none=True)
    return found[0], found[1]


@torch.inference_mode()
def draw(policy: nn.Module, work: Work, n: int) -> Tensor:
    """n chunks of each observation in 10 flow steps, from one encoding."""
    noise = work.noise.repeat_interleave(n, 0)
    return sample(policy, policy.encode(work.observation, features=False), noise, 10, n)
