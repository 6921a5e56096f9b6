"""What the host and the card are, and whether what the other stages need is there. Stages `machine` and `forecast`."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import time
import warnings
from dataclasses import asdict
from functools import partial

import torch
from gpu.cases import CASES, Bench
from gpu.record import Record
from suites._policy_table import copy_rate, matmul_rate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from serl_launcher.policies.estimate import BUFFERS

LIBRARIES = ("torch", "triton", "numpy", "transformers", "lerobot", "diffusers", "tokenizers", "accelerate", "pytest")
MODULES = (
    *("lerobot.policies.pi0.modeling_pi0", "lerobot.policies.pi05.modeling_pi05"),
    *("lerobot.policies.groot.groot_n1_7", "transformers.models.qwen3_vl.modeling_qwen3_vl"),
    *("peft", "accelerate", "pytest", "pytest_timeout"),
)
# Attention of PI0: heads · rows, keys, and the dims of a head; one key-value head.
SHAPES = {
    "released": {"prefix": (8, 816, 816, 256), "suffix": (8, 51, 867, 256)},
    "tiny": {"prefix": (8, 16, 16, 8), "suffix": (8, 5, 21, 8)},
}
BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def look(bench: Bench, record: Record) -> None:
    """Versions, imports, the card, its rates, and which attention takes PI0's shapes."""
    versions = {name: version(name) for name in LIBRARIES}
    record.figure("python", platform.python_version(), host=platform.platform(), cuda=torch.version.cuda, **versions)
    for name in MODULES:
        with record.part(f"import/{name}"):
            began = time.perf_counter()
            importlib.import_module(name)
            record.figure(f"import/{name}", time.perf_counter() - began, "s")
    with record.part("card"):
        facts = bench.device.facts()
        record.figure("card", facts["gpu"], **facts)
    where, half = bench.device.torch_device, bench.device.half
    with record.part("peaks"):
        record.figure("peak/matmul", matmul_rate(where, half) / 1e12, "TFLOP/s", precision=str(half))
        record.figure("peak/memory", copy_rate(where) / 1e9, "GB/s")
    for name, shape in SHAPES[bench.size].items():
        for backend in BACKENDS:
            attend(bench, record, f"attention/{name}/{backend.lower()}", shape, getattr(SDPBackend, backend))
    with record.part("compiler"):
        look_at_compiler(bench, record)


def version(name: str) -> str:
    """Of a library, or `absent`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def attend(bench: Bench, record: Record, name: str, shape: tuple[int, ...], backend: SDPBackend) -> None:
    """Microseconds of one masked attention by a backend; a refusal is an answer, not a failure."""
    heads, rows, keys, dim = shape
    make = partial(torch.randn, device=bench.device.torch_device, dtype=bench.device.half)
    q, k, v = make(1, heads, rows, dim), make(1, heads, keys, dim), make(1, heads, keys, dim)
    mask = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=q.device)
    for kind, given in (("masked", mask), ("unmasked", None)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                with sdpa_kernel(backend):
                    scaled_dot_product_attention(q, k, v, attn_mask=given)
                    bench.device.wait()
                    began = time.perf_counter()
                    for _ in range(10):
                        scaled_dot_product_attention(q, k, v, attn_mask=given)
                    bench.device.wait()
                record.figure(f"{name}/{kind}", (time.perf_counter() - began) * 1e5, "µs")
            except RuntimeError as refusal:
                reasons = [str(w.message) for w in told] or [str(refusal)]
                record.figure(f"{name}/{kind}", "refused", reason=reasons[0][:120])


def look_at_compiler(bench: Bench, record: Record) -> None:
    """Seconds of a first small compilation, and the C compiler that Triton asks for."""
    x = torch.ones(256, 256, device=bench.device.torch_device)
    began = time.perf_counter()
    made = torch.compile(lambda y: torch.nn.functional.silu(y) * y, backend=bench.device.compiler)(x)
    bench.device.wait()
    torch.testing.assert_close(made, torch.nn.functional.silu(x) * x)
    compilers = {name: shutil.which(name) for name in ("cc", "gcc", "g++")}
    record.figure("compiler", time.perf_counter() - began, "s", **compilers)


def forecast(bench: Bench, record: Record) -> None:
    """Preflight's costs of every case, on the meta device; runs beside the other stages and uses no card."""
    for name in CASES:
        with record.part(f"forecast/{name}"):
            cost = bench.forecast(name)
            answering = BUFFERS + cost.served + cost.answer  # without a version that is made ready beside it
            more = asdict(cost) | dict(training=cost.training, serving=cost.serving, answering=answering)
            record.figure(f"forecast/{name}", cost.training / 1e9, "GB", **more)
