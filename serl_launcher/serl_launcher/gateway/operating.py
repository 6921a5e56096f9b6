"""What an operator may ask of a running training: each request is checked, kept in the ledger of acts, then in force.

    request {…, id?} ─▶ Operating.take ─▶ refused in words, or {act, operator, done}: on disk, and every role reads it

docs/contracts/requests.md lists them. Owned by the gateway's loop; only `serve` leaves it, to compare a version's
checksum on a thread of its own.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from serl_config.nearest import nearest
from serl_launcher.gateway.actors import Actors
from serl_launcher.gateway.ledger import Ledger
from serl_launcher.gateway.operator_state import OperatorState
from serl_launcher.gateway.progress import TrainerProgress
from serl_launcher.run import live_settings
from serl_launcher.run.acts import Row, locked
from serl_launcher.run.in_force import WORDS
from serl_launcher.run.live_settings import GOALS, STAGES
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.schedule import StageState
from serl_launcher.run.versions import problem_of, versions_told
from serl_transport.contract.bounds import check_text, shown
from serl_transport.contract.errors import BadFrame, NotReady, Refused, StorageFull, WireError

log = logging.getLogger("gateway")
KEYS = {
    "pause": ("actor",),
    "resume": ("actor",),
    "training_pause": (),
    "training_resume": (),
    "verdict": ("episode_id", "word"),
    "serve": ("version",),
    "set": ("key", "value"),
    "end_stage": ("stage",),
    "publish": (),
    "stop": (),
}
OF_EVERY = ("id", "person")  # of the act, not done twice; who asks through a connection of another name (a console)
Done = Callable[[Row | WireError], None]


class Operating:
    """post: runs a callable on the loop (thread-safe); stage: where the run stands."""

    def __init__(
        self,
        paths: RunPaths,
        state: OperatorState,
        actors: Actors,
        ledger: Ledger,
        progress: TrainerProgress,
        stage: Callable[[], StageState],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._paths, self._state, self._actors, self._ledger = paths, state, actors, ledger
        self._progress, self._stage, self._post = progress, stage, post

    def take(self, request: str, body: Mapping[str, Any], by: str, done: Done) -> None:
        """One request of a person. `done` gets the act once it is kept, or what refuses it; perhaps later.

        WireError: refused at once.
        """
        for key in body:
            if key not in (known := (*KEYS[request], *OF_EVERY)):
                raise BadFrame(f"{request}: unknown key {shown(key)}{nearest(str(key), known)}")
        try:
            act_id, person = (_text(request, body, key) for key in OF_EVERY)
            if (kept := self._state.known(act_id)) is not None:
                return done(kept)
            said = getattr(self, f"_{request}")(body)
        except ValueError as mistake:
            raise Refused(str(mistake)) from None
        act, by = {"act": request, "id": act_id, **said}, f"{person} ({by})" if person else by
        if request == "serve" and said["version"] is not None:
            thread = threading.Thread(target=self._check_version, args=(act, by, done), name="pin-check", daemon=True)
            thread.start()
        else:
            done(self._state.keep(act, by))

    def obeyed(self, of: Any, version: int) -> None:
        """The trainer did what acts up to number `of` asked for, with this version; it says so until that is kept."""
        if type(of) is int and 0 < self._state.state.wanted <= of:
            try:
                self._state.keep({"act": "published", "of": of, "version": version}, by="trainer")
            except StorageFull as full:
                log.warning("%s; the trainer says again that act %d is done", full.message, of)

    # What each request needs; returns what its line says. ValueError in words for the person.

    def _pause(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._of_actor("pause", body)

    def _resume(self, body: Mapping[str, Any]) -> dict[str, Any]:
        said, state = self._of_actor("resume", body), self._state.state
        if said and state.paused:
            raise ValueError(f"resume: {state.paused} paused every actor; resume without an actor lets them go on")
        return said

    def _of_actor(self, request: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if (actor := body.get("actor")) is None:
            return {}
        known = self._actors.known().keys() | self._state.state.paused_actors.keys()
        if actor not in known:
            raise ValueError(f"{request}: no actor {shown(actor)} is here{nearest(str(actor), sorted(known))}")
        return {"actor": actor}

    def _training_pause(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self._need_trainer("training_pause")
        return {}

    def _training_resume(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def _publish(self, body: Mapping[str, Any]) -> dict[str, Any]:
        self._need_trainer("publish")
        return {}

    def _stop(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def _need_trainer(self, request: str) -> None:
        if not self._progress.is_alive and not any(stage.steps for stage in self._state.live.stages):
            raise ValueError(f"{request}: this run trains nothing: no stage names steps, and no trainer is here")

    def _verdict(self, body: Mapping[str, Any]) -> dict[str, Any]:
        word, episode_id = body.get("word"), self._episode(body.get("episode_id"))
        if word not in WORDS:
            raise ValueError(f"verdict: word: expected one of {', '.join(WORDS)}, got {shown(word)}")
        _, mode, truncated_by = self._ledger.known[episode_id]
        if mode == "eval" and word in ("accept", "reject", "discard"):
            raise ValueError(f"verdict: {episode_id} is an evaluation: nothing is learned from it whatever is said")
        if truncated_by == "discard" and word != "clear":
            raise ValueError(f"verdict: {episode_id} was thrown away at the robot, and stays so")
        return {"episode_id": episode_id, "word": word}

    def _episode(self, said: Any) -> str:
        """The id of a closed episode, by its id or its ordinal."""
        known = self._ledger.known
        if isinstance(said, str) and said in known:
            return said
        if type(said) is int and (found := [name for name, row in known.items() if row[0] == said]):
            return found[0]
        raise ValueError(
            f"verdict: no finished episode {shown(said)} in this run: expected an episode_id of episodes.jsonl, or an "
            f"ordinal from 0 to {len(known) - 1}"
        )

    def _serve(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if (version := body.get("version")) is not None:
            self._check_told(version)
        return {"version": version}

    def _check_told(self, version: Any) -> None:
        told = sorted(versions_told(self._paths.params))
        if type(version) is not int or version not in told:
            there = f"there are {', '.join(map(str, told))}" if told else "there is none yet"
            raise ValueError(f"serve: version {shown(version)} is not on disk: {there}")

    def _check_version(self, act: Mapping[str, Any], by: str, done: Done) -> None:
        """On a thread: the file is whole. Then the loop pins it, while nothing can be pruned."""
        problem = problem_of(self._paths.params, act["version"])
        self._post(partial(self._pin, act, by, done, problem))

    def _pin(self, act: Mapping[str, Any], by: str, done: Done, problem: str | None) -> None:
        try:
            if problem is not None:
                raise Refused(f"serve: {problem}")
            with locked(self._paths.params):
                self._check_told(act["version"])
                row = self._state.keep(act, by)
        except ValueError as gone:
            done(Refused(str(gone)))
        except OSError as held:
            done(NotReady(str(held)))
        except WireError as refusal:
            done(refusal)
        else:
            done(row)

    def _set(self, body: Mapping[str, Any]) -> dict[str, Any]:
        key, value, state = body.get("key"), body.get("value"), self._state
        if not isinstance(key, str) or "value" not in body:
            raise ValueError("set: expected {key: a key of the config, value}")
        live_settings.check(state.live.config, key, value)
        if key.startswith(f"{STAGES}."):
            self._check_goal(key, value)
        return {"key": key, "value": value, "was": live_settings.value_of(state.config, key)}

    def _check_goal(self, key: str, value: int) -> None:
        """A stage that is over stays so; one that has taken its steps is ended, so that they are published."""
        name, _, goal = key.removeprefix(f"{STAGES}.").rpartition(".")
        stages, current = self._state.live.stages, self._stage()
        place = next(k for k, stage in enumerate(stages) if stage.name == name)
        if current.done or place < current.index:
            raise ValueError(f"{key}: stage {name} is over")
        taken = self._progress.stage_steps.get(name, 0)
        if goal == "steps" and value <= taken:
            raise ValueError(f"{key}: expected more than the {taken} steps taken, got {value}; end_stage ends it now")

    def _end_stage(self, body: Mapping[str, Any]) -> dict[str, Any]:
        current = self._stage()
        stage, named = current.stage, body.get("stage")
        if stage is None or current.done:
            raise ValueError("end_stage: no stage goes on: every stage of the schedule is done")
        if named is not None and named != stage.name:
            raise ValueError(f"end_stage: {shown(named)} does not go on now, {stage.name} does")
        goals = {goal: getattr(stage, goal) for goal in GOALS}
        return {"stage": stage.name, "goals": goals, "trains": bool(stage.steps)}


def _text(request: str, body: Mapping[str, Any], key: str) -> str | None:
    return check_text(f"{request}: {key}", body[key], 64) if body.get(key) is not None else None
