"""The policy behind an openpi websocket server drives this robot: `rollout.policy=openpi`. Built by `wiring`; no torch.

    infer body ─▶ message as rollout.openpi.observation lays it out ─▶ websocket ─▶ openpi server (any)
    {actions float32[ah, ad], policy_version} ◀── checked ◀── answer

Transitions go to the learner as always; they carry policy version −1, because no version of the run acted, unless the
server is this run's own. A server that is away or busy is waited for (NotReady), one that can never answer this robot
is a mistake of the user (ValueError).
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np

from openpi_client.base_policy import BasePolicy
from openpi_client.image_tools import resize_with_pad
from openpi_client.websocket_client_policy import (
    AccessDeniedError,
    AnswerError,
    PolicyServerError,
    WebsocketClientPolicy,
)
from serl_config.secrets import secret
from serl_transport.connection.reach import is_ipv6, resolved
from serl_transport.contract.bounds import printable
from serl_transport.contract.errors import Internal, NotReady, WireError
from serl_transport.contract.specs import TaskSpec

log = logging.getLogger(__name__)
NO_VERSION = -1
CONNECT_S = 3.0  # at most: the control loop waits for it, and people for a word
_KEY = "rollout.openpi"
_STATE = re.compile(r"state\[(\d*):(\d*)\]")
_GUIDED = ("seed", "mode", "prefix_actions", "inference_delay")  # what a FlowSERL server is told beside
_WORDS = re.compile(r"(\w+): (.*)", re.DOTALL)  # its refusals: code and message
_RETRIED = ("not_ready", "deadline_missed", "internal")

Source = Callable[[Mapping[str, Any]], Any]  # infer body -> one value of the message


@dataclass(frozen=True, slots=True)
class OpenpiSettings:
    """`rollout.openpi` of the config, checked."""

    host: str = "127.0.0.1"  # or a whole ws:// or wss:// address
    port: int | None = 8000
    token: str | None = field(default=None, repr=False)
    auth: str = "Api-Key"  # Api-Key | Bearer
    ca_file: str | None = None  # PEM
    timeout_s: float = 10.0  # for connecting and for each answer
    observation: Mapping[str, Any] | None = None  # nested: the server's keys -> sources; None: images, state, prompt
    image_size: tuple[int, int] | None = None  # (h, w) to pad and resize to
    channels_first: bool = False  # images as [3, h, w]

    @staticmethod
    def of(node: Mapping[str, Any], spec: TaskSpec) -> "OpenpiSettings":
        """Raises ValueError in the user's words."""
        if unknown := sorted(set(node) - {one.name for one in fields(OpenpiSettings)}):
            known = ", ".join(one.name for one in fields(OpenpiSettings))
            raise ValueError(f"{_KEY}.{unknown[0]}: no such key; the keys are {known}")
        settings = OpenpiSettings(**{**node, "token": secret(node.get("token"), f"{_KEY}.token")})
        if settings.auth not in ("Api-Key", "Bearer"):
            raise ValueError(f"{_KEY}.auth: expected Api-Key or Bearer, got {settings.auth!r}")
        scheme, found, _ = settings.host.partition("://")
        if found and scheme not in ("ws", "wss"):
            raise ValueError(f"{_KEY}.host: expected a name, an address, ws://… or wss://…, got {settings.host!r}")
        if not found and ":" in settings.host and not is_ipv6(settings.host):
            raise ValueError(f"{_KEY}.host: expected a name or an address (port: {_KEY}.port), got {settings.host!r}")
        if settings.timeout_s <= 0:
            raise ValueError(f"{_KEY}.timeout_s: expected a number above 0, got {settings.timeout_s:g}")
        size = settings.image_size
        if size is not None and (len(size) != 2 or not all(type(n) is int and n > 0 for n in size)):
            raise ValueError(f"{_KEY}.image_size: expected [h, w] in pixels, got {list(size)}")
        Layout(settings, spec)
        return settings


class Layout:
    """Makes a server's message of an `infer` body."""

    def __init__(self, settings: OpenpiSettings, spec: TaskSpec) -> None:
        self._settings, self._spec = settings, spec
        cameras = {camera: camera for camera in spec.cameras}
        default = {"images": cameras, "state": "state", "prompt": "prompt"}
        tree = default if settings.observation is None else settings.observation
        self._sources = dict(self._flat(tree, f"{_KEY}.observation", ()))  # path in the message -> what goes there

    def message(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Nested dict of arrays and texts."""
        message: dict[str, Any] = {}
        for path, source in self._sources.items():
            node = message
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = source(body)
        return message

    def keys(self) -> str:
        """The message's keys, for people."""
        return ", ".join(".".join(path) for path in self._sources)

    def _flat(self, node: Any, where: str, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Source]]:
        if not isinstance(node, Mapping) or not node:
            raise ValueError(f"{where}: expected a map of the server's keys to {self._choices()}, got {node!r}")
        for key, value in node.items():
            inner, here = f"{where}.{key}", (*path, str(key))
            if isinstance(value, Mapping):
                yield from self._flat(value, inner, here)
            else:
                yield here, self._source(value, inner)

    def _source(self, name: Any, where: str) -> Source:
        if name in self._spec.cameras:
            return partial(self._image, name)
        if name == "state":
            return lambda body: body["observation"]["state"]
        if name == "prompt":
            return lambda body: body["prompt"]
        if match := _STATE.fullmatch(str(name)):
            span = slice(*(int(n) if n else None for n in match.groups()))
            if np.arange(len(self._spec.state_names))[span].size:
                return lambda body: np.ascontiguousarray(body["observation"]["state"][span])
        raise ValueError(f"{where}: expected {self._choices()}, got {name!r}")

    def _image(self, camera: str, body: Mapping[str, Any]) -> np.ndarray:
        image = body["observation"]["images"][camera]
        if self._settings.image_size is not None:
            image = resize_with_pad(image, *self._settings.image_size)
        return np.ascontiguousarray(np.moveaxis(image, 2, 0)) if self._settings.channels_first else image

    def _choices(self) -> str:
        n = len(self._spec.state_names)
        return f"a camera ({', '.join(self._spec.cameras)}), state, state[i:j] of {n} numbers, or prompt"


class OpenpiPolicy(BasePolicy):
    """One connection, made anew when it breaks.

    Args:
        settings: of `rollout.openpi`.
        spec: the task's; the answer must fit its actions.
        run: the run's name; a FlowSERL server of another run has versions that mean nothing here.
        guided: whether questions carry the running chunk (rollout.realtime=rtc), which a stock server ignores.

    Raises ValueError for a key that the server does not accept.
    """

    def __init__(self, settings: OpenpiSettings, spec: TaskSpec, run: str, guided: bool) -> None:
        self._settings, self._spec, self._run, self._guided = settings, spec, run, guided
        self._layout = Layout(settings, spec)
        self._server: WebsocketClientPolicy | None = None
        self._is_flowserl = self._is_own_run = self._has_answered = False
        try:
            self._connect()
        except NotReady as away:
            log.warning("%s; it is waited for where an action is wanted", away)

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """`actions` float32[ah, ad] and `policy_version`.

        Raises NotReady or Internal when asking again may help, ValueError when the config must change.
        """
        server = self._server or self._connect()
        try:
            answer = server.infer(self._message(obs))
        except AnswerError as error:
            self._judge(error)
        except PolicyServerError as error:
            self.close()
            raise NotReady(str(error)) from error
        self._has_answered = True
        return {"actions": self._actions(answer), "policy_version": self._version(answer)}

    def close(self) -> None:
        """Hang up; the next question connects again."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def _connect(self) -> WebsocketClientPolicy:
        s = self._settings
        bound = {"timeout_s": s.timeout_s, "connect_s": min(s.timeout_s, CONNECT_S)}
        try:
            self._check_name()
            server = WebsocketClientPolicy(s.host, s.port, s.token, **bound, ca_file=s.ca_file, auth_scheme=s.auth)
        except AccessDeniedError as error:
            raise ValueError(f"{error}: {_KEY}.token and {_KEY}.auth") from error
        except (PolicyServerError, OSError) as error:
            raise NotReady(f"{error} ({_KEY}.host, {_KEY}.port)") from error
        self._is_flowserl = server.metadata.get("server") == "flowserl"
        self._is_own_run = self._is_flowserl and server.metadata.get("run") == self._run
        if self._guided and not self._is_flowserl:
            server.close()
            raise ValueError(
                f"rollout.realtime=rtc: the openpi server at {server.uri} cannot guide a chunk; set it to async or off"
            )
        self._server = server
        return server

    def _check_name(self) -> None:
        """OSError within seconds when the host's name does not resolve, unless a proxy does that."""
        if not getproxies():
            host = self._settings.host
            resolved((urlsplit(host).hostname or host) if "://" in host else host, self._settings.port or 0)

    def _message(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        message = self._layout.message(obs)
        if self._is_flowserl:
            told = (*_GUIDED, "min_version") if self._is_own_run else _GUIDED
            message |= {key: obs[key] for key in told if obs.get(key) is not None}
            message["deadline_ms"] = self._settings.timeout_s * 1e3
        return message

    def _judge(self, error: AnswerError) -> None:
        """Raise what an error in words means: ask again, or a mistake in the layout."""
        match = _WORDS.fullmatch(error.reason)
        if self._is_flowserl and match and match[1] in _RETRIED:
            raise WireError.from_code(match[1], f"{match[2]} ({_KEY})") from error
        self.close()  # a stock server hangs up after its traceback
        lines = [line for line in error.reason.strip().splitlines() if line.strip()]
        reason = printable(lines[-1].strip()[:500]) if lines else "without a word"
        where = f"{self._settings.host}:{self._settings.port}"
        if self._is_flowserl or not self._has_answered:  # it never understood us
            raise ValueError(
                f"the openpi server at {where} failed on the observation: {reason}. It was sent {self._layout.keys()}; "
                f"map what it wants in {_KEY}.observation"
            ) from error
        raise Internal(f"the openpi server at {where} failed: {reason}") from error

    def _actions(self, answer: Mapping[str, Any]) -> np.ndarray:
        actions, names = answer.get("actions"), self._spec.action_names
        if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.shape[1] != len(names):
            got = f"{list(actions.shape)}" if isinstance(actions, np.ndarray) else f"{sorted(map(str, answer))}"
            raise ValueError(
                f"the openpi server at {self._settings.host}:{self._settings.port} does not drive this robot: expected "
                f"actions [ticks, {len(names)}] ({', '.join(names)}), got {got}; serve a policy of this robot"
            )
        return np.asarray(actions, np.float32)

    def _version(self, answer: Mapping[str, Any]) -> int:
        version = answer.get("policy_version")
        return int(version) if self._is_own_run and isinstance(version, int | np.integer) else NO_VERSION
