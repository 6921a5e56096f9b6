"""What an actor produces: time steps, step batches and whole episodes.

The adder turns `TimeStep`s into `StepBatch`es; a batch travels as `to_body()`, and the gateway validates it with
`from_body(body, spec)`, journals it, and assembles finished `Episode`s. Letters: n ticks, m observations, s state dim,
ad action dim. An episode of n ticks has n+1 observations, and no observation is ever stored twice.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from serl_transport.contract.bounds import (
    ID_BYTES,
    INT32,
    INT64,
    LARGEST,
    LARGEST_REWARD,
    LAST_SECOND,
    PROMPT_CHARACTERS,
    check_name,
    check_number,
    check_row_range,
    check_text,
    check_whole,
    shown,
)
from serl_transport.contract.errors import BadFrame, SchemaMismatch
from serl_transport.contract.packed import Packed
from serl_transport.contract.people import each_once, read_people
from serl_transport.contract.specs import Observation, TaskSpec, all_finite, check_array, check_finite

MODES = ("demo", "online", "eval")
SUCCESS_SOURCES = ("environment", "human", "classifier")
DISCARD = "discard"  # a person threw the episode away: it is recorded, and nobody learns from it
TRUNCATED_BY = (None, "time_limit", "dead_actor", "stop", DISCARD)
IMAGE_PREFIX = "observation.images."
STATE = "observation.state"
ACTION = "action"
PER_TICK = {  # key -> dtype of the arrays with one scalar per tick
    "next.reward": np.float32,
    "next.done": np.bool_,
    "next.truncated": np.bool_,
    "next.success": np.bool_,
    "intervention": np.bool_,
    "policy_version": np.int64,
    "time_ns": np.int64,
}


@dataclass(frozen=True, slots=True)
class TimeStep:
    """One control tick: what was seen, what was executed, what came of it."""

    observation: Observation  # before the action
    action: np.ndarray  # float32[ad], executed, physical units
    reward: float  # next.reward
    done: bool  # terminated: success or failure state, no bootstrap
    truncated: bool  # time limit or cut, bootstrap
    success: bool  # next.success
    intervention: bool  # the operator drove this tick
    policy_version: int  # version that produced (or would have produced) the action; -1: no policy
    time_ns: int  # monotonic capture time of the observation
    driver: str | None = None  # who drove it, a person's name or `script`; None: the policy, or it is not known


@dataclass(frozen=True, slots=True)
class EpisodeInfo:
    """Who made an episode, and why."""

    episode_id: str  # unique, given by the ticket
    actor_id: str  # the actor's unique_identifier
    boot_id: str  # the actor process that made it
    task: str  # TaskSpec.name
    prompt: str  # what the policy was told
    mode: str  # demo | online | eval
    stage: str  # name of the schedule's stage
    seed: int  # of the environment's reset
    start_time: float  # unix seconds


_REMEMBERED = 2 * PROMPT_CHARACTERS  # characters of an info that is kept: a longer one is not taken anyway
_INFO_TYPES = {field.name: field.type for field in fields(EpisodeInfo)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended."""

    success: bool  # the task was done
    success_source: str  # environment | human | classifier
    truncated_by: str | None  # None (it terminated) | time_limit | dead_actor | stop | discard
    judge: str | None = None  # the person who said so; None: nobody did, or it is not known


@dataclass(frozen=True, slots=True)
class StepBatch:
    """n consecutive ticks of one episode: the unit on the wire, in spool and journal. Its pictures may be `Packed`."""

    episode: EpisodeInfo  # the episode it belongs to
    first_tick: int  # index of the first tick in the episode
    arrays: Mapping[str, np.ndarray]  # see docs/contracts/time_steps.md; m = n, or n+1 observations in the final batch
    final: bool = False  # the episode's last batch
    outcome: Outcome | None = None  # in the final batch only
    drivers: tuple[str, ...] = ()  # who drove some of its ticks, by name
    lossy: str | None = None  # how its pictures were packed where that changed pixels (`jpeg:90`); None: they are exact

    @property
    def n(self) -> int:
        """Number of ticks; 0 only in a final batch that carries nothing but the last observation."""
        return len(self.arrays[ACTION])

    @classmethod
    def from_steps(
        cls,
        episode: EpisodeInfo,
        first_tick: int,
        steps: Sequence[TimeStep],
        last_observation: Observation | None = None,
        outcome: Outcome | None = None,
    ) -> "StepBatch":
        """Stack `steps` (at least one); with `last_observation` and `outcome` it is the final batch."""
        if (last_observation is None) != (outcome is None):
            raise ValueError("a final batch needs both the last observation and the outcome")
        if not steps:
            raise ValueError("a step batch needs at least one step")
        observations = [step.observation for step in steps]
        if last_observation is not None:
            observations.append(last_observation)
        arrays = stack_observations(observations)
        arrays[ACTION] = np.stack([step.action for step in steps])
        for key, dtype in PER_TICK.items():
            name = key.removeprefix("next.")
            arrays[key] = np.array([getattr(step, name) for step in steps], dtype=dtype)
        return cls(episode, first_tick, arrays, outcome is not None, outcome, each_once(step.driver for step in steps))

    def to_body(self) -> dict[str, Any]:
        """The batch as a body for `codec.pack`."""
        return {
            "episode": asdict(self.episode),
            "first_tick": self.first_tick,
            "final": self.final,
            "outcome": None if self.outcome is None else asdict(self.outcome),
            **({"drivers": list(self.drivers)} if self.drivers else {}),
            "arrays": dict(self.arrays),
        }

    @classmethod
    def from_body(cls, body: Mapping[str, Any], spec: TaskSpec) -> "StepBatch":
        """Validate a body. BadFrame when it is malformed, SchemaMismatch when it breaks the task's spec."""
        types = {"episode": dict, "first_tick": int, "final": bool, "arrays": dict}
        _check_map("step batch", body, types, {"outcome"}, {"drivers"})
        outcome = body["outcome"]
        if (outcome is not None) != body["final"]:
            raise BadFrame(f"step batch: outcome belongs to the final batch only, final is {body['final']}")
        batch = cls(
            episode=_read_info(body["episode"]),
            first_tick=body["first_tick"],
            arrays=body["arrays"],
            final=body["final"],
            outcome=None if outcome is None else _read_outcome(outcome),
            drivers=read_people("step batch: drivers", body.get("drivers", [])),
        )
        try:
            batch.check(spec)
        except ValueError as error:
            raise batch._mismatch(error) from None
        return batch

    def check_ranges(self, spec: TaskSpec) -> None:
        """SchemaMismatch naming the first value that a later reader could not take (`contract.bounds`). Not part of
        `from_body`, which also reads the journals of earlier releases."""
        try:
            _check_info_ranges(self.episode)
            check_finite(STATE, self.arrays[STATE], spec.state_names, LARGEST)
            check_finite(ACTION, self.arrays[ACTION], spec.action_names, LARGEST)
            check_row_range("next.reward", self.arrays["next.reward"], -LARGEST_REWARD, LARGEST_REWARD)
            check_row_range("policy_version", self.arrays["policy_version"], -1, INT32)
            check_row_range("time_ns", self.arrays["time_ns"], 0, INT64)
        except ValueError as error:
            raise self._mismatch(error) from None

    def _mismatch(self, error: ValueError) -> SchemaMismatch:
        return SchemaMismatch(f"episode {shown(self.episode.episode_id)} tick {self.first_tick}: {error}")

    def check(self, spec: TaskSpec) -> None:
        """Raise ValueError naming the first key, dim or rule of the task that the batch breaks."""
        if self.episode.task != spec.name:
            raise ValueError(f"expected task {spec.name!r}, got {shown(self.episode.task)}")
        rows = _rows(tuple(spec.cameras.items()), spec.state_dim, spec.action_dim)
        n = _check_keys(self.arrays, rows.keys(), spec)
        if self.first_tick < 0 or self.first_tick + n > spec.max_ticks:
            raise ValueError(f"ticks {self.first_tick}..{self.first_tick + n} leave 0..{spec.max_ticks} (max_ticks)")
        if not n and not self.final:
            raise ValueError("a batch that is not final has at least one tick")
        _check_arrays(self.arrays, rows, spec, n, n + self.final)
        _check_flags(self.arrays, n, self.final, self.outcome)


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode: n ticks, n+1 observations, in the arrays of `StepBatch`."""

    info: EpisodeInfo  # who made it
    outcome: Outcome  # how it ended
    arrays: Mapping[str, np.ndarray]  # n per-tick rows, n+1 observation rows
    drivers: tuple[str, ...] = ()  # who drove some of its ticks, by name; none in records of older releases
    lossy: tuple[str, ...] = ()  # how pictures were packed that are not exactly what a camera gave

    @property
    def n(self) -> int:
        """Number of ticks."""
        return len(self.arrays[ACTION])

    @classmethod
    def from_batches(cls, batches: Sequence[StepBatch]) -> "Episode":
        """Join batches in tick order, the last one final. ValueError on a gap, a foreign batch or no final batch."""
        _check_sequence(batches)
        last = batches[-1]
        if last.outcome is None:
            raise ValueError(f"episode {last.episode.episode_id!r} has no final batch; use Episode.cut")
        arrays = _concatenate(batches)
        # a final batch without ticks (a stop between batches) closes the last tick that was already sent
        if last.n == 0 and len(arrays[ACTION]):
            arrays["next.truncated"][-1] = True
        return cls(last.episode, last.outcome, arrays, *_joined(batches))

    @classmethod
    def cut(cls, batches: Sequence[StepBatch], truncated_by: str = "dead_actor") -> "Episode | None":
        """The episode of an actor that died: its last tick, whose next observation never came, is dropped.

        The tick before it is marked truncated, the outcome is a failure. None when no whole tick remains.
        """
        _check_sequence(batches)
        if batches[-1].final:
            raise ValueError(f"episode {batches[-1].episode.episode_id!r} is finished; use Episode.from_batches")
        whole = _concatenate(batches)
        n = len(whole[ACTION]) - 1
        if n < 1:
            return None
        arrays = {key: rows if _is_observation(key) else rows[:n].copy() for key, rows in whole.items()}
        arrays["next.truncated"][-1] = True
        return cls(batches[-1].episode, Outcome(False, "environment", truncated_by), arrays, *_joined(batches))


def stack_observations(observations: Sequence[Observation]) -> dict[str, np.ndarray]:
    """Arrays of m observations: `observation.images.<cam>` uint8[m, h, w, 3] and `observation.state` float32[m, s]."""
    arrays = {
        IMAGE_PREFIX + camera: np.stack([observation.images[camera] for observation in observations])
        for camera in observations[0].images
    }
    arrays[STATE] = np.stack([observation.state for observation in observations])
    return arrays


def _is_observation(key: str) -> bool:
    return key == STATE or key.startswith(IMAGE_PREFIX)


def _check_sequence(batches: Sequence[StepBatch]) -> None:
    if not batches:
        raise ValueError("an episode has at least one batch")
    tick, episode_id = 0, batches[0].episode.episode_id
    for position, batch in enumerate(batches):
        if batch.episode.episode_id != episode_id:
            raise ValueError(f"episode {episode_id!r}: got a batch of {batch.episode.episode_id!r}")
        if batch.first_tick != tick:
            raise ValueError(f"episode {episode_id!r}: expected a batch at tick {tick}, got {batch.first_tick}")
        if batch.final and position + 1 < len(batches):
            raise ValueError(f"episode {episode_id!r}: a batch follows the final one")
        tick += batch.n


def _concatenate(batches: Sequence[StepBatch]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([batch.arrays[key] for batch in batches]) for key in batches[0].arrays}


def _joined(batches: Sequence[StepBatch]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`drivers` and `lossy` of an episode."""
    return each_once(name for batch in batches for name in batch.drivers), each_once(batch.lossy for batch in batches)


def _check_map(
    label: str, value: Any, types: Mapping[str, Any], untyped: Set[str] = frozenset(), newer: Set[str] = frozenset()
) -> None:
    """newer: keys that records of older releases lack."""
    if not isinstance(value, Mapping):
        raise BadFrame(f"{label}: expected a map, got {type(value).__name__}")
    wanted = types.keys() | untyped
    if value.keys() - newer != wanted:
        missing, extra = sorted(wanted - value.keys()), sorted(value.keys() - wanted - newer)
        raise BadFrame(f"{label}: missing keys {missing}, unknown keys {shown(extra)}")
    for key, kind in types.items():
        item = value[key]
        if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
            raise BadFrame(f"{label}: {key}: expected {kind.__name__}, got {type(item).__name__}")


def _read_info(value: Any) -> EpisodeInfo:
    """The batches of an episode repeat its info: what was found right is not looked at again."""
    try:
        if sum(len(text) for text in value.values() if type(text) is str) > _REMEMBERED:
            return _checked_info(value)
        return _read_info_once(tuple(value.items()), tuple(map(type, value.values())))
    except (AttributeError, TypeError):  # not a map, or values that are no info's
        return _checked_info(value)


@lru_cache(256)
def _read_info_once(items: tuple[tuple[str, Any], ...], types: tuple[type, ...]) -> EpisodeInfo:
    return _checked_info(dict(items))


def _checked_info(value: Any) -> EpisodeInfo:
    _check_map("episode", value, _INFO_TYPES)
    info = EpisodeInfo(**value)
    if info.mode not in MODES:
        raise BadFrame(f"episode: mode: expected one of {MODES}, got {shown(info.mode)}")
    for key in ("episode_id", "actor_id", "boot_id"):
        if not 0 < len(getattr(info, key)) <= 256:
            raise BadFrame(f"episode: {key}: expected 1 to 256 characters, got {len(getattr(info, key))}")
    if not np.isfinite(info.start_time):
        raise BadFrame(f"episode: start_time: expected a finite number, got {info.start_time}")
    return info


@lru_cache(256)
def _check_info_ranges(info: EpisodeInfo) -> None:
    check_name("episode_id", info.episode_id, ID_BYTES)
    if "~" in info.episode_id:
        raise ValueError(f"episode_id: expected no ~, which marks the late part of one, got {shown(info.episode_id)}")
    for key in ("actor_id", "boot_id", "stage"):
        check_name(key, getattr(info, key))
    check_text("prompt", info.prompt, PROMPT_CHARACTERS)
    check_whole("seed", info.seed, 0, INT64)
    check_number("start_time", info.start_time, 0, LAST_SECOND)


def _read_outcome(value: Any) -> Outcome:
    _check_map("outcome", value, {"success": bool, "success_source": str}, {"truncated_by"}, {"judge"})
    for key, known in (("success_source", SUCCESS_SOURCES), ("truncated_by", TRUNCATED_BY)):
        if value[key] not in known:
            raise BadFrame(f"outcome: {key}: expected one of {known}, got {shown(value[key])}")
    read_people("outcome: judge", [name] if (name := value.get("judge")) is not None else [])
    return Outcome(**value)


_Rows = dict[str, tuple[np.dtype, bool, tuple[int, ...]]]


@lru_cache(64)
def _rows(cameras: tuple[tuple[str, tuple[int, int]], ...], s: int, ad: int) -> _Rows:
    """Per key of a batch: dtype, whether it has a row per observation (else per tick), shape of a row."""
    rows: _Rows = {IMAGE_PREFIX + camera: (np.dtype(np.uint8), True, (*hw, 3)) for camera, hw in cameras}
    rows |= {STATE: (np.dtype(np.float32), True, (s,)), ACTION: (np.dtype(np.float32), False, (ad,))}
    return rows | {key: (np.dtype(dtype), False, ()) for key, dtype in PER_TICK.items()}


def _check_keys(arrays: Mapping[str, np.ndarray], wanted: Set[str], spec: TaskSpec) -> int:
    """The number of ticks, after checking that exactly the contract's keys are there."""
    if arrays.keys() != wanted:
        missing, extra = sorted(wanted - arrays.keys()), sorted(arrays.keys() - wanted)
        raise ValueError(f"arrays: missing {missing}, unknown {shown(extra)}")
    action = arrays[ACTION]
    if not isinstance(action, np.ndarray) or action.ndim != 2:
        raise ValueError(f"action: expected float32[n, {spec.action_dim}], got {np.shape(action)}")
    return len(action)


def _check_arrays(arrays: Mapping[str, np.ndarray], rows: _Rows, spec: TaskSpec, n: int, m: int) -> None:
    for key, (dtype, observed, row) in rows.items():
        array, shape = arrays[key], (m if observed else n, *row)
        if type(array) not in (np.ndarray, Packed) or array.dtype != dtype or array.shape != shape:
            check_array(key, array, dtype, shape)
    check_finite(STATE, arrays[STATE], spec.state_names)
    check_finite(ACTION, arrays[ACTION], spec.action_names)
    if not all_finite(arrays["next.reward"]):
        raise ValueError("next.reward: expected finite numbers")
    if n and (least := min(arrays["policy_version"].tolist())) < -1:
        raise ValueError(f"policy_version: expected -1 or more, got {least}")


def _check_flags(arrays: Mapping[str, np.ndarray], n: int, final: bool, outcome: Outcome | None) -> None:
    """Only the episode's last tick is done or truncated, and it agrees with the outcome."""
    done, truncated = arrays["next.done"], arrays["next.truncated"]
    ended = done | truncated
    inner = ended[: n - 1] if final else ended
    if b"\1" in inner.tobytes():  # several times cheaper than any(), of so few
        raise ValueError(f"next.done or next.truncated is set at row {int(inner.argmax())}, before the episode's end")
    if outcome is None:
        return
    cut = outcome.truncated_by is not None
    if n == 0 and not cut:
        raise ValueError("a final batch without ticks needs outcome.truncated_by")
    if n and not (truncated[-1] if cut else done[-1]):
        flag = "next.truncated" if cut else "next.done"
        raise ValueError(f"{flag} must be set at the last tick when truncated_by is {outcome.truncated_by!r}")
