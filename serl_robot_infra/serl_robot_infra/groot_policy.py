"""The policy behind a GR00T server (ZMQ, port 5555) drives this robot: `rollout.policy=groot`. Built by `wiring`.

    infer body ─▶ the keys that the server's modality config names ─▶ get_action ─▶ GR00T server (N1.5, N1.6, N1.7)
    {actions float32[ah, ad], policy_version −1} ◀── parts put together as modality.json says ◀── answer

The server says on connecting which cameras, parts and text it wants, and in which generation's form; what this robot
lacks is said then. A server that is away or silent is waited for (NotReady), one that can never answer this robot is a
mistake of the user (ValueError). Which dims a part has, the protocol does not say: `rollout.groot.modality` does.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from openpi_client.base_policy import BasePolicy
from openpi_client.groot_client import GrootClient
from openpi_client.groot_layout import PROMPT, Layout
from openpi_client.groot_wire import ModalityConfig
from openpi_client.websocket_client_policy import AccessDeniedError, AnswerError, PolicyServerError
from serl_config.secrets import secret
from serl_transport.connection.reach import is_ipv6
from serl_transport.contract.bounds import check_number, check_whole, printable
from serl_transport.contract.errors import Internal, NotReady
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)
NO_VERSION = -1  # no version of the run acted
HELLO_S = 3.0  # at most for the first answer: the control loop waits for it, and people for a word
_KEY = "rollout.groot"


@dataclass(frozen=True, slots=True)
class GrootSettings:
    """`rollout.groot` of the config, checked."""

    layout: Layout
    host: str = "127.0.0.1"
    port: int = 5555
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 10.0  # for each answer

    @staticmethod
    def of(node: Mapping[str, Any], spec: TaskSpec) -> "GrootSettings":
        """Raises ValueError in the user's words."""
        known = ("modality", *(one.name for one in fields(GrootSettings) if one.name != "layout"))
        if unknown := sorted(set(node) - set(known)):
            raise ValueError(f"{_KEY}.{unknown[0]}: no such key; the keys are {', '.join(known)}")
        given = {name: value for name, value in node.items() if name != "modality"}
        given["token"] = secret(node.get("token"), f"{_KEY}.token")
        settings = GrootSettings(Layout.read(node.get("modality"), spec, f"{_KEY}.modality"), **given)
        if ":" in settings.host and not is_ipv6(settings.host):
            raise ValueError(f"{_KEY}.host: expected a name or an address (port: {_KEY}.port), got {settings.host!r}")
        check_whole(f"{_KEY}.port", settings.port, 1, 65535)
        check_number(f"{_KEY}.timeout_s", settings.timeout_s, 0.1, 600)
        return settings


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server's modality config asks of an observation."""

    cameras: dict[str, str]  # its video key -> camera of the task
    state: dict[str, tuple[int, int]]  # part -> dims of the task's state
    prompt: str  # its key for the text
    nested: bool  # N1.6 and later: {video: {key}, state: {key}, language: {key}}, each with batch and time

    def observation(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Of one `infer` body. Nested: uint8[1, 1, h, w, 3], float32[1, 1, dims], [[text]]; else, as N1.5 takes it,
        `video.<key>` uint8[1, h, w, 3], `state.<part>` float32[1, dims], `annotation.…` [text]."""
        images, state = body["observation"]["images"], body["observation"]["state"]
        video = {key: np.ascontiguousarray(images[camera])[None] for key, camera in self.cameras.items()}
        parts = {name: np.asarray(state[start:end], np.float32)[None] for name, (start, end) in self.state.items()}
        if not self.nested:
            flat = {f"video.{key}": x for key, x in video.items()} | {f"state.{name}": x for name, x in parts.items()}
            return flat | {self.prompt: [body["prompt"]]}
        batched = {"video": video, "state": parts}
        nested = {modality: {key: x[None] for key, x in found.items()} for modality, found in batched.items()}
        return nested | {"language": {self.prompt: [[body["prompt"]]]}}


class GrootPolicy(BasePolicy):
    """One connection, made anew when it breaks.

    Args:
        settings: of `rollout.groot`.
        spec: the task's; the answer must fit its actions.
        guided: whether questions would carry the running chunk (rollout.realtime=rtc), which the protocol cannot.

    Raises ValueError for a token that the server does not accept, and for a server of another robot.
    """

    def __init__(self, settings: GrootSettings, spec: TaskSpec, guided: bool) -> None:
        if guided:
            raise ValueError("rollout.realtime=rtc: GR00T's protocol cannot guide a chunk; set it to async or off")
        self._settings, self._spec = settings, spec
        self._client: GrootClient | None = None
        self._wanted: Wanted | None = None
        self._has_answered = False
        self._one = (
            threading.Lock()
        )  # a REQ socket is asked by one thread at a time; reset comes from another than infer
        try:
            self._connect()
        except NotReady as away:
            log.warning("%s; it is waited for where an action is wanted", away)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """`actions` float32[ah, ad] and `policy_version`.

        Raises NotReady or Internal when asking again may help, ValueError when the config must change.
        """
        with self._one:
            client, wanted = self._connect()
            observation = wanted.observation(obs)
            data = {"observation": observation, "options": None} if wanted.nested else observation
            answer = self._call(client, "get_action", data)
        self._has_answered = True
        return {"actions": self._actions(answer), "policy_version": NO_VERSION}

    def reset(self) -> None:
        """Tell the server that another episode begins, where it has such an endpoint (N1.6 and later)."""
        with self._one:
            if self._client is None or self._wanted is None or not self._wanted.nested:
                return
            try:
                self._client.call("reset", {"options": None}, min(self._settings.timeout_s, HELLO_S))
            except PolicyServerError as error:
                log.warning("%s; an episode begins without its reset", error)
                self.close()

    def close(self) -> None:
        """Hang up; the next question connects again."""
        if self._client is not None:
            self._client.close()
        self._client = self._wanted = None

    def _connect(self) -> tuple[GrootClient, Wanted]:
        if self._client is not None and self._wanted is not None:
            return self._client, self._wanted
        try:
            return self._greet()
        except (ValueError, NotReady):
            self.close()
            raise

    def _greet(self) -> tuple[GrootClient, Wanted]:
        """A new connection, and what the server said it wants."""
        s = self._settings
        try:
            self._client = GrootClient(s.host, s.port, s.token, s.timeout_s)
            configs = self._client.modality_configs(min(s.timeout_s, HELLO_S))
        except AccessDeniedError as error:
            raise ValueError(f"{error}: {_KEY}.token") from None
        except AnswerError as error:
            reason = printable(error.reason)[:500]
            raise ValueError(f"the GR00T server at {self._where} cannot drive a robot: {reason}") from None
        except PolicyServerError as error:
            raise NotReady(f"{error} ({_KEY}.host, {_KEY}.port)") from error
        self._wanted = wanted(configs, s.layout, s.host, self._spec)
        return self._client, self._wanted

    def _call(self, client: GrootClient, endpoint: str, data: dict[str, Any]) -> Any:
        try:
            return client.call(endpoint, data)
        except AccessDeniedError as error:
            raise ValueError(f"{error}: {_KEY}.token") from None
        except AnswerError as error:
            told = f"the GR00T server at {self._where} failed on the observation: {printable(error.reason)[:500]}"
            if not self._has_answered:  # it never understood us
                raise ValueError(
                    f"{told}. Does {_KEY}.modality describe the data that its policy was trained on?"
                ) from None
            raise Internal(told) from error
        except PolicyServerError as error:
            self.close()
            raise NotReady(str(error)) from error

    def _actions(self, answer: Any) -> np.ndarray:
        """N1.6 and later answer [parts, info], N1.5 the parts."""
        parts = answer[0] if isinstance(answer, list) and len(answer) == 2 else answer
        try:
            if not isinstance(parts, Mapping):
                raise ValueError(f"expected parts of actions, got {type(answer).__name__}")
            return self._settings.layout.join_actions(parts)
        except ValueError as error:
            raise ValueError(
                f"the GR00T server at {self._where} does not drive this robot: {error} "
                f"({', '.join(self._spec.action_names)}); serve a policy of this robot, or change {_KEY}.modality"
            ) from None

    @property
    def _where(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"


def wanted(configs: Mapping[str, ModalityConfig], layout: Layout, host: str, spec: TaskSpec) -> Wanted:
    """What the server asks for, found in the layout. ValueError naming what this robot lacks, or what is no single tick
    or text."""
    keys = {name: [key.removeprefix(f"{name}.") for key in config.modality_keys] for name, config in configs.items()}
    for name in ("video", "state"):
        if configs[name].delta_indices != [0]:
            got = configs[name].delta_indices
            raise ValueError(
                f"the GR00T server at {host} wants {name} of ticks {got}; only the present one (0) is sent"
            )
    for name, ours in (("video", layout.cameras), ("state", layout.state), ("action", layout.action)):
        if absent := [key for key in keys[name] if key not in ours]:
            raise ValueError(
                f"the GR00T server at {host} has {name} {absent[0]!r}, this robot {', '.join(ours)}: name it in "
                f"{_KEY}.modality (the modality.json of the data that the policy was trained on)"
            )
    if missing := [part for part in layout.action if part not in keys["action"]]:
        raise ValueError(
            f"the GR00T server at {host} gives no action {missing[0]!r}, which moves this robot "
            f"({', '.join(spec.action_names)}); it gives {', '.join(keys['action'])}"
        )
    language = configs["language"].modality_keys if "language" in configs else []
    return Wanted(
        {key: layout.cameras[key] for key in keys["video"]},
        {part: layout.state[part] for part in keys["state"]},
        language[0] if language else PROMPT,
        nested=not configs["video"].as_text,
    )
