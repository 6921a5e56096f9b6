"""Where a step's time goes: some steps under torch's profiler, a trace and a table of their parts. `trainer.profile`.

    Trainer, Learner: timed("sample"), timed("forward") ─▶ Profile ─ after its last step ─▶ profile/trace_rank0.json,
                                                                                            table_rank0.txt and the log

The trace opens in chrome://tracing or ui.perfetto.dev. A part is the host's time: on a GPU forward, backward and
optimizer are queued in it, and what the device does is in the trace's rows and in the table's operations.
`device_metrics` has a GPU's memory and utilisation for the log; `be_deterministic` is `trainer.deterministic`.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from serl_launcher.run.files import make_folder, write_text, write_whole

log = logging.getLogger("trainer")
MARK = "step/"  # what the parts' names begin with in the trace
ROWS = 20  # operations in the table


def timed(name: str) -> record_function:
    """A part of a step happens inside; a few microseconds where nobody looks."""
    return record_function(MARK + name)


class Profile:
    """folder: profile/ of the run; after: steps of this start before the first that is looked at; steps: how many, 0
    for none; rank: of this process."""

    def __init__(self, folder: Path, *, after: int, steps: int, rank: int = 0) -> None:
        self._folder, self._after, self._steps, self._rank = folder, after, steps, rank
        self._seen, self._began = 0, 0.0
        self._profiler: Any = None

    def next_step(self) -> None:
        """Before each step. A disk that refuses trace or table is told of, and training goes on."""
        if self._seen == self._after and self._steps:
            cards = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cards], acc_events=True)
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._profiler is not None and self._seen == self._after + self._steps:
            self._end()
        self._seen += 1

    def _end(self) -> None:
        took, profiler, self._profiler = time.perf_counter() - self._began, self._profiler, None
        profiler.stop()
        events = profiler.key_averages()
        seconds = {e.key.removeprefix(MARK): e.cpu_time_total / 1e6 for e in events if e.key.startswith(MARK)}
        shown = table(seconds, took, self._steps)
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        operations = events.table(sort_by=by, row_limit=ROWS, max_name_column_width=50)
        try:
            make_folder(self._folder)
            trace = self._folder / f"trace_rank{self._rank}.json"
            write_whole(trace, lambda file: profiler.export_chrome_trace(str(file)))
            write_text(self._folder / f"table_rank{self._rank}.txt", f"{shown}\n\n{operations}\n")
        except (OSError, RuntimeError) as error:
            log.warning("the profile could not be written to %s: %s", self._folder, error)
        log.info("where the time of %d steps went; the trace is in %s\n%s", self._steps, self._folder, shown)


def table(seconds: dict[str, float], took: float, steps: int) -> str:
    """Milliseconds a step and share of each part, and of what is outside all of them. seconds: of the parts, which do
    not overlap; took: of all the steps."""
    rows = [("a step", took), *seconds.items(), ("outside these", took - sum(seconds.values()))]
    return "\n".join(f"{name:16}{1e3 * s / steps:10.2f} ms {s / took:7.1%}" for name, s in rows)


def device_metrics(device: torch.device) -> dict[str, float]:
    """Of a GPU: memory in GB, allocated and reserved now, and the most that was since the start; the share of time in
    which it worked lately, where NVIDIA's library is installed (nvidia-ml-py). Nothing of a CPU."""
    if device.type != "cuda":
        return {}
    found = {
        "device/allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
        "device/reserved_gb": torch.cuda.memory_reserved(device) / 1e9,
        "device/peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }
    try:
        return found | {"device/utilisation": torch.cuda.utilization(device) / 100}
    except (ModuleNotFoundError, RuntimeError):  # no such library, or a driver that does not say
        return found


def be_deterministic() -> None:
    """Only algorithms whose result is the same each time, in this process; before CUDA is used. An operation that has
    none raises RuntimeError and names itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # docs.nvidia.com/cuda/cublas, reproducibility
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for mistakes, not for repeating
    torch.backends.cudnn.benchmark = False
