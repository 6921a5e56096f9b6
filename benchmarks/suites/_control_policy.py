"""The policy server of the control suite, a process without torch: answers as late and as long as the observation says.

    python _control_policy.py <run_dir>

The state is [delay in seconds, actions in a chunk]; the chunk is zeros. Ends with its parent's SIGTERM.
"""

import heapq
import itertools
import sys
import time

import numpy as np

from serl_launcher.run.internal import InferRequest, PolicyLink

REPORT_S = 1.0


def main(run_dir: str) -> None:
    """Serve for ever."""
    link = PolicyLink(run_dir)
    due: list[tuple[float, int, InferRequest, int]] = []  # when, a tie-breaker, whom, how many actions
    count, report_at = itertools.count(), 0.0
    while True:
        now = time.monotonic()
        if now >= report_at:
            link.serving(version=1)
            report_at = now + REPORT_S
        while due and due[0][0] <= now:
            _, _, request, length = heapq.heappop(due)
            actions = np.zeros((length, 2), np.float32)
            link.reply(request.token, {"actions": actions, "policy_version": 1, "server_ms": 0.0})
        next_at = min(report_at, due[0][0]) if due else report_at
        request = link.receive(max(0.0, next_at - time.monotonic()))
        if request is not None:
            delay_s, length = request.body["observation"]["state"]
            heapq.heappush(due, (request.arrived + float(delay_s), next(count), request, int(length)))


if __name__ == "__main__":
    main(sys.argv[1])
