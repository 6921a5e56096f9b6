"""A run as a job of a cluster: what a node executes, and what follows the time limit. Made by tools/submit_job.py.

    submitit ─▶ Job() on each node: the learner, on the first node `actors` simulated actors beside it
       └ before the time limit, or when the job is preempted: Job.checkpoint() ─▶ both end in order, queued again

The run folder is the state: the same words in the same folder go on where the run was (`resume=auto`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowserl_cli.actors import keep_all
from flowserl_cli.sides import Side, Stopper
from serl_config.process import free_port


class Job:
    """What one job runs. It is pickled: nothing in it belongs to a host.

    words: of the run, `run=` among them. root: the checkout, as the nodes see it. actors: simulated ones, on the first
    node; a job of one node that has some takes free ports, as another job's learner may be there.
    """

    def __init__(self, words: Sequence[str], root: Path, actors: int) -> None:
        self._words, self._root, self._actors = list(words), root, actors
        self._sides: list[Side] = []  # once it runs

    def __call__(self) -> int:
        """Run to the end; the learner's exit code. RuntimeError where it is not 0: that is how submitit hears of it."""
        from submitit import JobEnvironment

        os.chdir(self._root)
        environment = JobEnvironment()
        words, actors = [*self._words], self._actors if environment.node == 0 else 0
        if environment.num_nodes > 1:
            words += [
                f"launch.num_machines={environment.num_nodes}",
                f"launch.machine_rank={environment.node}",
                f"launch.main_host={environment.hostnames[0]}",
            ]
        elif actors:
            words += [f"port={free_port()}", f"broadcast_port={free_port()}"]
        self._sides = [Side("learner", words, self._root, prefixed=True)]
        for name in (f"actor-{number}" for number in range(actors)):
            self._sides.append(Side("actor", [*words, f"unique_identifier={name}"], self._root, True, label=name))
        code = keep_all(self._sides, Stopper(), leads=self._sides[0])
        if code:
            raise RuntimeError(f"the run ended with exit code {code}; its screen is above, its logs in the run folder")
        return code

    def checkpoint(self) -> Any:
        """Called by submitit in the job's process: everything ends in order, and the same job is queued again."""
        from submitit.helpers import DelayedSubmission

        for side in reversed(self._sides):  # actors first: they deliver what they hold
            side.stop()
        return DelayedSubmission(Job(self._words, self._root, self._actors))
