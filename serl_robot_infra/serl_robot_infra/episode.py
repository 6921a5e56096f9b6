"""Runs one episode: reset, then tick by tick until it ends or is cut. Called by `actor.Actor` with a ticket.

    operator there? ─▶ reset ─▶ [scene set? "ready"] ─▶ tick × n ─▶ the end, its outcome, the robot at rest
    one tick:  policy chunk ─▶ operator ─▶ safety ─▶ guard ─▶ env.step ─▶ reward ─▶ a person's words ─▶ adder

What is recorded as `action` is what left the safety chain, so what was executed. A tick that may not be executed
(NaN, silent policy, e-stop, watchdog, stop) ends the episode before it: truncated, with every executed tick kept.
Whatever ends it but the environment's own word, the robot is told to hold or to stop before anything else happens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.realtime_chunk_broker import RealtimeChunkBroker
from serl_config.clock import steady_time
from serl_robot_infra.adder import Adder
from serl_robot_infra.calls import Calls
from serl_robot_infra.envs.base import Environment, PartLostError, StepResult, kept_result
from serl_robot_infra.guard import RobotGuard
from serl_robot_infra.interventions.base import NOTHING_SAID, Intervention, OperatorGoneError, Voice, Words, ruled
from serl_robot_infra.interventions.none import NoIntervention
from serl_robot_infra.link import Run
from serl_robot_infra.observers.base import EpisodeReport, Observer
from serl_robot_infra.pacing import Pace, StopSignal
from serl_robot_infra.policy_client import infer_body
from serl_robot_infra.rewards.base import RewardSource
from serl_robot_infra.safety import SafetyChain, UnsafeTickError
from serl_transport.contract.errors import DeadlineMissed, Internal, NotReady, ServerSilent
from serl_transport.contract.people import SCRIPT, named
from serl_transport.contract.schema import DISCARD, EpisodeInfo, Observation, Outcome, TimeStep

_RETRY_S = 0.2
_LISTEN_S = 0.05  # between two looks at what a person says while the robot waits for them


class EpisodeCutError(Exception):
    """The episode cannot go on; the message says why, for people."""


class DiscardedError(EpisodeCutError):
    """A person threw the episode away while the policy was waited for."""


@dataclass(slots=True)
class _Progress:
    """The episode in hand."""

    ticket: Run
    index: int  # of this process's episodes
    started: float  # monotonic seconds
    driven_since: float  # the same, of the first tick
    seen_at: int  # monotonic ns, when the current observation was captured
    observation: Observation | None = None  # the current one
    tick: int = 0
    return_: float = 0.0
    operator_ticks: int = 0
    policy_version: int = -1  # that answered last
    declared: bool = False  # the environment itself said that the episode is over
    said: Words = NOTHING_SAID  # by a person since the last tick
    judge: str | None = None  # who said so
    last: bool = False  # a person said stop: no episode follows


@dataclass(frozen=True, slots=True)
class ControlStack:
    """What an action passes through in one tick, from whoever drives to the robot, and what its result goes to."""

    env: Environment
    broker: ActionChunkBroker | RealtimeChunkBroker | None  # the policy, an action at a time; None: demonstrations only
    operator: Intervention
    safety: SafetyChain
    reward: RewardSource
    adder: Adder
    pace: Pace
    guard: RobotGuard  # e-stop and watchdog
    voices: Sequence[Voice] = ()  # who may say something: the operator, the keys of a terminal
    calls: Calls = field(default_factory=Calls)  # into env, operator, reward and voices


@dataclass(frozen=True, slots=True)
class EpisodeRunner:
    """Runs tickets on one control stack."""

    stack: ControlStack
    observer: Observer  # told of everything
    stop: StopSignal  # cuts the running episode when set
    actor_id: str  # `unique_identifier`
    boot_id: str  # of the link
    may_take_over: bool  # may the operator drive in online episodes? demonstrations are always its own
    demo_noise: float  # actuator disturbance in demonstrations, share of the action range
    hold_limit_s: float  # an episode whose policy stays silent for longer is cut
    operator_name: str = SCRIPT  # who sits at this actor's devices, where a device does not know better
    ready: str | None = None  # each episode waits for a person's `ready`: how to say it, for people; None: it does not
    over: Callable[[], str | None] = lambda: None  # why the learner has no more tickets: nothing is begun then

    def run(self, ticket: Run, index: int) -> EpisodeReport:
        """Run the ticket's episode; `index` counts the episodes of this process."""
        now = _Progress(ticket, index, time.monotonic(), time.monotonic(), time.monotonic_ns())
        outcome = Outcome(False, self.stack.reward.success_source, "stop")
        reason = None
        operator = self._begin(now)
        try:
            self._reset(now, operator)
            ended = None
            while ended is None:
                self.stack.pace.wait()
                ended = self._tick(now, operator)
            outcome = ended
        except DiscardedError:
            outcome = Outcome(False, "human", DISCARD, now.judge)
        except (EpisodeCutError, UnsafeTickError, PartLostError, OperatorGoneError) as cut:
            reason = f"episode {ticket.episode_id} cut at tick {now.tick}: {cut}"
        except BaseException:
            # The robot stops, what was executed is recorded, then the error goes on.
            self._end(now, outcome, "the actor failed", leaving=True)
            raise
        return self._end(now, outcome, reason)

    def asked_to_stop(self) -> bool:
        """Did a person say stop since the last episode? Whatever else was said between two episodes is forgotten."""
        said = NOTHING_SAID
        for voice in self.stack.voices:
            with self.stack.calls(voice, "words"):
                said |= voice.words() if voice.missing() is None else NOTHING_SAID
        self._tell_too_late(said)
        return said.stop

    def _begin(self, now: _Progress) -> Intervention:
        ticket, spec = now.ticket, self.stack.env.spec
        if ticket.mode != "demo" and self.stack.broker is None:
            raise ValueError(
                f"rollout.policy=none cannot run the {ticket.mode} episode asked for; set rollout.mode=demo"
            )
        takeover = ticket.mode == "online" and ticket.takeover and self.may_take_over
        operator = self.stack.operator if ticket.mode == "demo" or takeover else NoIntervention()
        if ticket.mode == "demo" and isinstance(operator, NoIntervention):
            raise ValueError("a demonstration needs an operator: set task.operator, or operator=keyboard and the like")
        self.stack.safety.reset()
        if self.stack.broker:
            self.stack.broker.reset()
        info = EpisodeInfo(
            episode_id=ticket.episode_id,
            actor_id=self.actor_id,
            boot_id=self.boot_id,
            task=spec.name,
            prompt=spec.prompt,
            mode=ticket.mode,
            stage=ticket.stage,
            seed=ticket.seed,
            start_time=steady_time(),
        )
        self.stack.adder.begin(info)
        self.observer.episode_started(info)
        return operator

    def _reset(self, now: _Progress, operator: Intervention) -> None:
        """Home, wait for the scene where that is asked for, and forget what was pressed meanwhile."""
        self._wait_for(now, lambda: self._absent(operator) if now.ticket.mode == "demo" else None)
        self._observe(now, self._home(now))
        if self.ready is not None:
            self._forget(now)
            asked = f"{now.ticket.episode_id}: {self.ready}"
            self.observer.ask(asked)
            self._wait_for(now, lambda: None if now.said.ready else asked)
            self._observe(now, self._seen_anew(now))
        self._forget(now)
        with self.stack.calls(operator, "reset"):
            operator.reset(np.random.default_rng([now.ticket.seed, 2]), from_start=now.ticket.mode == "demo")
        with self.stack.calls(self.stack.reward, "reset"):
            self.stack.reward.reset()
        self.stack.pace.start()

    def _home(self, now: _Progress) -> Observation:
        self._check_stop(now)
        if (reason := self.stack.guard.begin()) is not None:
            raise EpisodeCutError(reason)
        noise = self.demo_noise if now.ticket.mode == "demo" else 0.0
        with self.stack.calls(self.stack.env, "reset"):
            return self.stack.env.reset(now.ticket.seed, actuator_noise=noise)

    def _seen_anew(self, now: _Progress) -> Observation:
        """The scene that a person has set, another one than after the reset."""
        look = getattr(self.stack.env, "observe", None)
        if look is None:
            return self._home(now)
        with self.stack.calls(self.stack.env, "observe"):
            return look()

    def _observe(self, now: _Progress, observation: Observation) -> None:
        now.seen_at = time.monotonic_ns()
        observation = observation.kept()
        self.stack.safety.check_observation(observation)
        now.observation = observation

    def _missing(self) -> str | None:
        for voice in self.stack.voices:
            with self.stack.calls(voice, "missing"):
                if (reason := voice.missing()) is not None:
                    return f"waiting for the operator: {reason}"
        return None

    def _absent(self, operator: Intervention) -> str | None:
        with self.stack.calls(operator, "absent"):
            return operator.absent()

    def _wait_for(self, now: _Progress, reason: Callable[[], str | None]) -> None:
        """Until the operator is there and no reason is left. A person may say stop meanwhile, and the e-stop counts."""
        while (why := self._missing() or reason()) is not None:
            self._check_stop(now)
            self.observer.trouble(why)
            self.stop.wait(_LISTEN_S)
            if self._missing() is None:
                self._hear(now)
            if now.last:
                raise EpisodeCutError("the operator said stop")

    def _hear(self, now: _Progress) -> None:
        """What people said since they were asked last; `stop` counts whenever it is said."""
        for voice in self.stack.voices:
            with self.stack.calls(voice, "words"):
                said = voice.words()
            if said.judges:
                now.judge = named(voice, self.operator_name)
            now.said |= said
        now.last = now.last or now.said.stop

    def _heard(self, now: _Progress) -> tuple[Words, OperatorGoneError | None]:
        """What was said of the tick that was just executed, and whether the device is gone."""
        gone = None
        try:
            self._hear(now)
        except OperatorGoneError as error:
            gone = error
        said, now.said = now.said, NOTHING_SAID
        return said, gone

    def _forget(self, now: _Progress) -> None:
        """What was said before the first tick, while the robot homed, judges nothing."""
        self._hear(now)
        self._tell_too_late(now.said)
        now.said = NOTHING_SAID

    def _tell_too_late(self, said: Words) -> None:
        if words := [word for word in ("success", "failure", "discard") if getattr(said, word)]:
            self.observer.message(f"{' and '.join(words)}: said when no episode was running, counts for nothing")

    def _tick(self, now: _Progress, operator: Intervention) -> Outcome | None:
        """Execute and record one tick; the outcome when it was the last."""
        self._check_stop(now)
        before, seen_at = now.observation, now.seen_at
        assert before is not None
        with self.stack.calls(operator, "act"):
            action, intervened = operator.act(before, self._proposal(now), now.tick)
        if intervened and self.stack.broker:
            self.stack.broker.drop_chunk()  # it was planned from where the robot no longer is
        source = "operator" if intervened else f"policy version {now.policy_version}"
        if self.stack.guard.held:
            self.stack.safety.reset()
        action = self.stack.safety.filter(action, before.state, source)
        if not now.tick:
            self._forget(now)  # also what was said while the policy was waited for
            now.driven_since = time.monotonic()
        if (reason := self.stack.guard.feed()) is not None:
            raise EpisodeCutError(reason)
        with self.stack.calls(self.stack.env, "step"):
            stepped = kept_result(self.stack.env.step(action.copy()))
        now.declared = stepped.terminated or stepped.truncated
        if stepped.executed is not None:
            action = self.stack.safety.executed(stepped.executed)
        said, gone = self._heard(now)
        with self.stack.calls(self.stack.reward, "judge"):
            judged = self.stack.reward.judge(stepped)
        result = self._limit_time(now, ruled(judged, said, now.return_))
        now.seen_at = time.monotonic_ns()
        result = self.stack.safety.check_result(result)
        step = TimeStep(
            before,
            action,
            reward=result.reward,
            done=result.terminated,
            truncated=result.truncated,
            success=result.success,
            intervention=intervened,
            policy_version=now.policy_version,
            time_ns=seen_at,
            driver=named(operator, self.operator_name) if intervened else None,
        )
        self._record(now, step, result.observation)
        outcome = self._outcome(result, said, now.judge)
        if gone is not None and outcome is None:
            raise gone  # only now: what was executed is recorded
        return outcome

    def _record(self, now: _Progress, step: TimeStep, after: Observation) -> None:
        self.stack.adder.add(step)
        now.observation = after
        now.tick += 1
        now.return_ += step.reward
        now.operator_ticks += step.intervention
        self.observer.tick(step)

    def _limit_time(self, now: _Progress, result: StepResult) -> StepResult:
        """A robot's environment need not count ticks itself."""
        late = now.tick + 1 >= self.stack.env.spec.max_ticks and not result.terminated
        return replace(result, truncated=True) if late else result

    def _outcome(self, result: StepResult, said: Words, judge: str | None) -> Outcome | None:
        if said.discard:
            return Outcome(False, "human", DISCARD, judge)
        if not (result.terminated or result.truncated):
            return None
        cut = None if result.terminated else "time_limit"
        source = "human" if said.judges else self.stack.reward.success_source
        return Outcome(result.success, source, cut, judge if said.judges else None)

    def _end(self, now: _Progress, outcome: Outcome, reason: str | None, leaving: bool = False) -> EpisodeReport:
        driven_s = time.monotonic() - now.driven_since
        # The robot comes first: what follows waits for a disk, and for people who look on.
        if now.declared:
            self.stack.guard.disarm()
        else:
            self.stack.guard.rest(stop=leaving or bool(self.stop))
        if now.observation is None:
            self.stack.adder.abandon()
        else:
            self.stack.adder.end(now.observation, outcome)
        report = EpisodeReport(
            index=now.index,
            info=self.stack.adder.info,
            outcome=outcome,
            cut_reason=reason,
            ticks=now.tick,
            return_=now.return_,
            operator_ticks=now.operator_ticks,
            seconds=time.monotonic() - now.started,
            driven_s=driven_s if now.tick else 0.0,
            policy_version=now.policy_version,
            last=now.last,
        )
        self.observer.episode_ended(report, now.observation)
        return report

    def _proposal(self, now: _Progress) -> Callable[[], np.ndarray]:
        """Asks the policy for this tick's action when called; an operator who drives anyway does not call it."""

        def propose() -> np.ndarray:
            broker, ticket = self.stack.broker, now.ticket
            assert broker is not None
            assert now.observation is not None
            # Evaluation is repeatable: the sampled noise is a function of the episode's seed and the tick.
            seed = ticket.seed * 4096 + now.tick if ticket.mode == "eval" else None
            body = infer_body(now.observation, self.stack.env.spec.prompt, ticket.min_version, seed, ticket.mode)
            with self.stack.calls.called_back():
                answer = self._patiently(now, lambda: broker.infer(body))
            now.policy_version = int(answer["policy_version"])
            if "plan" in answer:
                self.observer.planned(answer["plan"])
            return np.array(answer["actions"])

        return propose

    def _patiently(self, now: _Progress, ask: Callable[[], dict]) -> dict:
        """Ask until there is an answer. The robot holds meanwhile: nothing is executed, and so nothing recorded.

        Before the first tick there is nothing to lose and it waits as long as it takes; later up to `hold_limit_s`.
        """
        since = time.monotonic()
        while True:
            try:
                return ask()
            except (NotReady, DeadlineMissed, ServerSilent, Internal) as problem:
                waited = time.monotonic() - since
                if now.tick and waited > self.hold_limit_s:
                    raise EpisodeCutError(f"no action for {waited:.0f} s (hold_limit_s): {problem}") from None
                who = "learner silent" if isinstance(problem, ServerSilent) else "policy not ready"
                self.observer.message(f"{who} for {waited:.0f} s; holding ({problem})")
            self._listen_meanwhile(now)
            self._check_stop(now)
            self.stop.wait(_RETRY_S)

    def _listen_meanwhile(self, now: _Progress) -> None:
        """A person need not wait for the policy to throw the episode away, or to stop before its first tick."""
        self._hear(now)
        if now.tick and now.said.discard:
            raise DiscardedError("discarded")
        if not now.tick and now.last:
            raise EpisodeCutError("the operator said stop")

    def _check_stop(self, now: _Progress) -> None:
        if not now.tick and (over := self.over()) is not None:
            raise EpisodeCutError(f"not begun: {over}")
        if (reason := self.stack.guard.forbids()) is not None:
            raise EpisodeCutError(reason)
        if self.stop:
            raise EpisodeCutError(f"stopped{f' by {self.stop.signal.name}' if self.stop.signal else ''}")
