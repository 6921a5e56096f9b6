"""A run as a job of a cluster: what a node executes, and what follows the time limit. Made by tools/submit_job.py.

    submitit ─▶ Job() on each node: the learner, on the first node `actors` simulated actors beside it
       └ before the time limit, or when the job is preempted: Job.checkpoint() ─▶ both end in order, queued again

The run folder is the state: the same words in the same folder go on where the run was (`resume=auto`).
"""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowserl_cli.several import keep_all
from flowserl_cli.sides import Side, Stopper


@dataclass
class Job:
    """What one job runs. It is pickled: nothing in it belongs to a host."""

    words: Sequence[str]  # of the run, `run=` among them
    root: Path  # the checkout, as the nodes see it
    actors: int = 0  # simulated ones, on the first node
    own_ports: bool = False  # take free ports: another job's learner may be on this node
    sides: list[Side] = field(default_factory=list)  # once it runs

    def __call__(self) -> int:
        """Run to the end; the learner's exit code. RuntimeError where it is not 0: that is how submitit hears of it."""
        os.chdir(self.root)
        words = [*self.words, *_place()]
        first = not any(word.startswith("launch.machine_rank=") and word[-2:] != "=0" for word in words)
        if self.own_ports and first:
            words += [f"port={free_port()}", f"broadcast_port={free_port()}"]
        self.sides = [Side("learner", words, self.root, prefixed=True)]
        for number in range(self.actors if first else 0):
            name = f"actor-{number}"
            self.sides.append(Side("actor", [*words, f"unique_identifier={name}"], self.root, True, label=name))
        code = keep_all(self.sides, Stopper(), leads=self.sides[0])
        if code:
            raise RuntimeError(
                f"the run ended with exit code {code}; its screen is above, its logs are in the run folder"
            )
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in the job's process: everything ends in order, and the same job is queued again."""
        from submitit.helpers import DelayedSubmission

        for side in reversed(self.sides):  # actors first: they deliver what they hold
            side.pass_on(signal.SIGTERM)
        for side in reversed(self.sides):
            side.stop()
        return DelayedSubmission(Job(self.words, self.root, self.actors, self.own_ports))


def _place() -> list[str]:
    """Words that say which of a job's nodes this is; none where there is one."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    if environment.num_nodes == 1:
        return []
    return [
        f"launch.num_machines={environment.num_nodes}",
        f"launch.machine_rank={environment.node}",
        f"launch.main_host={environment.hostnames[0]}",
    ]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
