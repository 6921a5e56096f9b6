"""One entry of `demos`: a dataset, and what of it is called otherwise in the task. Light: a start reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serl_config.nearest import nearest

KEYS = ("source", "cameras", "state", "action", "prompt", "episodes")


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of `demos`: a dataset, and what of it is called otherwise in the task."""

    source: str  # a folder, or a name on the hub
    cameras: Mapping[str, str] = field(default_factory=dict)  # the task's camera -> the dataset's, or its column
    state: Sequence[str] | None = None  # the dataset's dims in the task's order; None: by name
    action: Sequence[str] | None = None
    prompt: str | None = None  # in place of every text of the dataset
    episodes: Sequence[int] | None = None  # None: all

    @classmethod
    def read(cls, entry: object, key: str) -> "Source":
        """From the config: a text, or a mapping of KEYS. ValueError naming `key` and what is wrong."""
        if isinstance(entry, str) and entry:
            return cls(entry)
        if not isinstance(entry, Mapping) or not isinstance(entry.get("source"), str):
            raise ValueError(
                f"{key}: expected a folder or a hub name, or {{source, {', '.join(KEYS[1:])}}}, got {entry!r}"
            )
        for name, value in entry.items():
            if name not in KEYS:
                raise ValueError(f"{key}.{name}: unknown key{nearest(str(name), KEYS)}")
            if value is not None and not _is(name, value):
                raise ValueError(f"{key}.{name}: expected {_WANTED[name]}, got {value!r}")
        return cls(**{name: value for name, value in entry.items() if value is not None})


_WANTED = {
    "source": "a folder or a hub name",
    "cameras": "{the task's camera: the dataset's}",
    "state": "a list of the dataset's names",
    "action": "a list of the dataset's names",
    "prompt": "a text",
    "episodes": "a list of the dataset's episode numbers",
}


def _is(name: str, value: object) -> bool:
    if name in ("source", "prompt"):
        return isinstance(value, str) and bool(value.strip())
    if name == "cameras":
        return isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    kind = int if name == "episodes" else str
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(v) is kind for v in value)


def read_sources(demos: object) -> list[Source]:
    """`demos` of the config: nothing, one entry, or a list of them. ValueError names the entry and key."""
    if demos is None:
        return []
    entries = demos if isinstance(demos, Sequence) and not isinstance(demos, str) else [demos]
    found = [Source.read(entry, f"demos.{k}") for k, entry in enumerate(entries)]
    names = [source.source for source in found]
    for k, name in enumerate(names):
        if name in names[:k]:
            raise ValueError(f"demos.{k}: {name} is named twice; give its mapping once")
    return found
