"""Rows of a suite whose measuring may fail, run out of memory, hang or be killed: its own rows say so, others follow.

    apart: a child process ── rows over a pipe ──▶ the suite        what ends the child ends none of the rows after it

A suite hands over callables that can be pickled (functions of modules, partials of them). Children come from a process
that has imported what they need and never touched a card: they start in a second, each with a CUDA of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
from rows import Row

Measure = Callable[[], Iterator[Row]]
LIMIT_S = 900.0  # between two rows


def apart(name: str, measure: Measure, limit_s: float = LIMIT_S, method: str = "forkserver") -> Iterator[Row]:
    """The rows of `measure` from a process of its own, and one of `name` that says how it failed, where it did."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([guarded.__module__, getattr(measure, "func", measure).__module__])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(theirs, name, measure))
    child.start()
    theirs.close()
    try:
        while ours.poll(limit_s):
            yield ours.recv()
        yield Row.failed(name, f"failed: no row for {limit_s:g} s; it was ended")
    except EOFError:
        child.join(limit_s)
        if child.exitcode != 0:
            yield Row.failed(name, f"failed: its process {_ended(child.exitcode)}")
    finally:
        child.kill()
        child.join()


def guarded(name: str, measure: Measure) -> Iterator[Row]:
    """The rows of `measure`, and one of `name` that says what it raised; the device's memory is given back."""
    try:
        yield from measure()
    except torch.OutOfMemoryError:
        yield Row.failed(name, "out of memory")
    except Exception as error:
        lines = str(error).strip().splitlines()
        yield Row.failed(name, f"failed: {type(error).__name__}" + (f": {lines[0]}" if lines else ""))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _send(rows: Connection, name: str, measure: Measure) -> None:
    for row in guarded(name, measure):
        rows.send(row)


def _ended(exitcode: int | None) -> str:
    if exitcode is None:
        return "has not ended"
    return f"was ended by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
