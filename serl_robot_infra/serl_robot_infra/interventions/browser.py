"""The console's page as an operator's device: `operator=browser`. Built by `wiring` from config/operator/browser.yaml.

    page ─▶ console ─▶ gateway ─▶ answer to `hands` ─▶ thread ─▶ PageHold ─▶ HandOperator, once a tick

A dead man's switch over a network: what is not younger than `age_limit_ms` counts for nothing, and after as long
without a frame that counts, everything is let go. For simulations and slow arms; the e-stop is elsewhere and needs none
of this.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from serl_robot_infra.envs.base import Environment
from serl_robot_infra.interventions.base import OperatorGoneError
from serl_robot_infra.interventions.hand import HandOperator, HandSettings, check_commands, usable_axes
from serl_robot_infra.interventions.page_hold import PageHold
from serl_robot_infra.interventions.page_keys import PageKeys
from serl_robot_infra.link import LearnerLink
from serl_transport.contract.errors import WireError
from serl_transport.contract.hands import HandFrame
from serl_transport.contract.schema import Observation

log = logging.getLogger(__name__)
UNWATCHED_S, AGAIN_S = 0.2, 0.5  # between two looks whether a page is open; after a learner that did not answer
GONE_S = 2.0  # a demonstration whose page has let go for so long is cut
TABLE_EVERY = 25  # beats
_TIMEOUT_MS = 1000


class BrowserOperator(HandOperator):
    """Drives by hand from the page of the learner's console that has taken this actor.

    axes, keys, pad_axes, pad_buttons, deadband: `page_keys.PageKeys`. age_limit_ms: above 0; what is older counts for
    nothing. link: the learner's; None (tools/check_robot.py): nobody can be there. The others: `hand.HandSettings`.
    ValueError names the key that cannot be meant.
    """

    def __init__(
        self,
        env: Environment,
        axes: Mapping[str, Sequence[str]],
        keys: Mapping[str, str | None],
        pad_axes: Mapping[str, str],
        pad_buttons: Mapping[str, str | None],
        deadband: float,
        age_limit_ms: float,
        link: LearnerLink | None = None,
        **settings,
    ):
        if isinstance(age_limit_ms, bool) or not isinstance(age_limit_ms, int | float) or not age_limit_ms > 0:
            raise ValueError(f"operator.age_limit_ms: expected a number above 0, got {age_limit_ms!r}")
        checked = HandSettings(**settings)
        names = usable_axes({**axes, **pad_axes}, env.spec)
        table = PageKeys(
            {name: axes[name] for name in names if name in axes},
            check_commands(keys, "operator.keys"),
            {name: pad_axes[name] for name in names if name in pad_axes},
            check_commands(pad_buttons, "operator.pad_buttons"),
            deadband,
        )
        self._page = PageDevice(table, PageHold(age_limit_ms / 1e3), link, env.spec.control_hz)
        super().__init__(self._page, env.spec, names, checked)
        self._page.start(self.describe())

    def act(self, observation: Observation, propose: Callable[[], np.ndarray], tick: int) -> tuple[np.ndarray, bool]:
        """The person's action while their page holds this actor, else the policy's; a demonstration is cut without."""
        silent_s = self._page.hold.silent_s
        if silent_s > 0:
            self._let_go()
            if self._from_start and silent_s > GONE_S:
                raise OperatorGoneError(f"the page that drove let go {silent_s:.1f} s ago, in mid-demonstration")
        action, driven = super().act(observation, propose, tick)
        if driven:
            self._page.drove()
        return action, driven

    @property
    def person(self) -> str | None:
        """Who has the keys, or had them last, as they typed it at the page."""
        return self._page.hold.person

    def _drives(self, touched: bool) -> bool:
        """A stick takes over by the button that is held with it, and no longer."""
        return super()._drives(touched and not self._page.holds_takeover())

    def absent(self) -> str | None:
        """Why no demonstration can begin."""
        if self._page.hold.silent_s > 0:
            return "waiting for the operator: take the keys at the console, whose address is on the learner's screen"
        return None


class PageDevice:
    """Answers `hand.HandDevice`: asks the gateway for frames on a thread of its own, while a page is open."""

    def __init__(self, keys: PageKeys, hold: PageHold, link: LearnerLink | None, control_hz: float) -> None:
        self.hold = hold
        self.commands = tuple(dict.fromkeys(keys.commands.values()))
        self._keys, self._link = keys, link
        self._table: list[str] = []
        self._drove_at, self._lasts_s = -np.inf, max(0.5, 2 / control_hz)
        self._beats = 0
        self._ended = threading.Event()

    def start(self, table: Sequence[str]) -> None:
        """Listen from now on; table: what each key does, as the page shows it."""
        self._table = list(table)
        if self._link is not None:
            threading.Thread(target=self._run, args=(self._link,), name="page", daemon=True).start()

    def drove(self) -> None:
        """A tick's action was the person's."""
        self._drove_at = time.monotonic()

    def motion(self) -> Mapping[str, float]:
        return self._keys.motion(*self.hold.pressed())

    def pressed(self) -> Sequence[str]:
        """The words count when they were said in time; what drives, only while the page still holds this actor."""
        held = self.hold.silent_s <= 0
        given = [self._keys.commands[key] for key in self.hold.taps() if key in self._keys.commands]
        return [command for command in given if held or command not in ("takeover", "gripper")]

    def holds_takeover(self) -> bool:
        return self._keys.takes_over(self.hold.pressed()[0])

    def missing(self) -> str | None:
        return None if self._link is not None else "operator=browser is at the console of a learner, and there is none"

    def describe(self) -> Sequence[str]:
        return [*self._keys.describe(), "esc, another tab or window: let go at once"]

    def close(self) -> None:
        self._ended.set()

    def _run(self, link: LearnerLink) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            pause = self._ask(link)

    def _ask(self, link: LearnerLink) -> float:
        """One question for a frame; how long to wait until the next."""
        if not link.watched:
            return UNWATCHED_S
        try:
            answer = link.request("hands", self._beat(), timeout_ms=_TIMEOUT_MS)
        except WireError as error:
            log.debug("no frame of the page: %s", error)  # the console says so, and what was held is let go
            return AGAIN_S
        if (frame := answer.get("frame")) is not None:
            self._take(frame)
        return 0.0

    def _beat(self) -> dict[str, Any]:
        table = self._table if self._beats % TABLE_EVERY == 0 else None
        self._beats += 1
        return self.hold.beat() | {"driving": time.monotonic() - self._drove_at < self._lasts_s, "table": table}

    def _take(self, frame: Any) -> None:
        if isinstance(frame, dict) and frame.get("gone"):
            self.hold.let_go(frame.get("page"))
            return
        try:
            self.hold.take(HandFrame.of(frame))
        except ValueError as error:
            log.error("a frame of the page counts for nothing: %s", error)
