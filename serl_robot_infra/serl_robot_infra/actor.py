"""The actor: asks the learner for tickets and runs an episode for each. Built by `wiring`, run by `main`.

    loop:  ticket = link.request("next_episode")
           run  ─▶ EpisodeRunner.run(ticket) ─▶ step batches ─▶ spool ─▶ learner
           wait ─▶ sleep and ask again
           stop ─▶ flush the spool, sum up, leave

A silent learner is waited for: the loop says so and asks again. Nothing that was recorded depends on its being there.
One that had said that its run is over is not.
A person's "stop" ends it after the episode in hand, between two at once.
"""

from dataclasses import dataclass, field

from serl_robot_infra.episode import EpisodeRunner
from serl_robot_infra.estop import EmergencyStop
from serl_robot_infra.evaluation import EvaluationSummary
from serl_robot_infra.link import LearnerLink, Run, Stop, Ticket, Wait, parse_ticket
from serl_robot_infra.live_rollout import LiveRollout
from serl_robot_infra.observers.base import Observer
from serl_robot_infra.pacing import StopSignal
from serl_transport.contract.errors import Internal, NotReady, ServerSilent, StorageFull
from serl_transport.contract.schema import DISCARD

_RETRY_S = 1.0
_LATCHED_S = 0.1
_REQUEST_MS = 3000
_WANTS = ("follow", "demo", "online", "eval")


@dataclass(slots=True)
class Actor:
    """Runs tickets until the learner, the episode limit or a signal ends it. ValueError: an unknown mode."""

    runner: EpisodeRunner
    evaluation_runner: EpisodeRunner  # runs evaluations, which another reward may judge
    link: LearnerLink
    observer: Observer  # told of waiting and of the evaluation's result
    stop: StopSignal  # asked between episodes
    estop: EmergencyStop  # while it is latched no episode is begun
    mode: str  # what to ask for: follow (the learner's schedule), demo, online or eval
    episodes: int | None  # stop after this many; None: until told to
    live: LiveRollout | None = None  # what people change of `rollout` meanwhile; None: nobody can
    _count: int = field(default=0, init=False)
    _last: bool = field(default=False, init=False)  # a person said stop
    _evaluation: EvaluationSummary = field(default_factory=EvaluationSummary, init=False)

    def __post_init__(self) -> None:
        if self.mode not in _WANTS:
            raise ValueError(f"rollout.mode: expected one of {', '.join(_WANTS)}, got {self.mode!r}")

    def run(self) -> str:
        """The loop; why it ended and after how many episodes (of a tick at least, not discarded), for people."""
        try:
            reason = self._loop()
        finally:
            for line in self._evaluation.lines():
                self.observer.message(line)
        return f"{reason}; {self._count} episodes"

    def _loop(self) -> str:
        while not self.stop:
            if self._last or self.runner.asked_to_stop():
                return "stopped by the operator"
            if self.episodes is not None and self._count >= self.episodes:
                return f"{self._count} episodes done"
            if reason := self.estop.reason():
                self.observer.trouble(f"e-stop pressed: {reason}. When it is safe, remove {self.estop.path} to go on")
                self.stop.wait(_LATCHED_S)
                continue
            match self._next_ticket():
                case Run() as ticket:
                    self._run_episode(ticket)
                case Wait(seconds, reason):
                    self.observer.message(f"waiting: {reason}")
                    self.stop.wait(seconds)
                case Stop(reason):
                    return f"the learner says stop: {reason}"
        return f"stopped by {self.stop.signal.name}" if self.stop.signal else "stopped"

    def _run_episode(self, ticket: Run) -> None:
        if self.live is not None:
            self.live.take(ticket.rollout)
        runner = self.evaluation_runner if ticket.mode == "eval" else self.runner
        report = runner.run(ticket, self._count + 1)
        self._evaluation.add(report)
        if report.ticks and report.outcome.truncated_by != DISCARD:
            self._count += 1
        self._last = report.last
        if report.cut_reason and not report.last:
            self.stop.wait(_RETRY_S)  # whatever cut it may last; do not spin

    def _next_ticket(self) -> Ticket:
        asked = {"want": self.mode, "backlog": self.link.backlog}
        try:
            return parse_ticket(self.link.request("next_episode", asked, timeout_ms=_REQUEST_MS))
        except (ServerSilent, NotReady, StorageFull, Internal) as problem:
            if isinstance(problem, ServerSilent) and self.link.over is not None:
                return Stop(f"{self.link.over}, and it has left")
            return Wait(_RETRY_S, f"{problem}")
