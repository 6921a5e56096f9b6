"""Compose config/ and the command line's overrides into one resolved config, torch-free.

Called by train_rlpd.py, start.py and tests; yaml and `key=value` words flow in, a resolved OmegaConf config
flows out. A mistake raises ConfigError with one message that names the offending word and, for a misspelling, what is
nearest. `--config-dir=<folder>` among the words puts a lab's own groups in front of ours (lab.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowserl_cli.elsewhere import ELSEWHERE
from flowserl_cli.lab import Lab, take_lab
from serl_config.nearest import nearest
from serl_robot_infra.task_yaml import check_keys, check_names, check_task

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"

NO_GROUPS = ("submit",)  # folders of config/ that no run is composed of: presets of tools/submit_job.py
# Keys that take one word of a few. Group choices are the files of the group's folder and need no entry here.
CHOICES: dict[str, tuple[str, ...]] = {
    "rollout.mode": ("follow", "demo", "online", "eval"),
    "rollout.policy": ("remote", "local", "openpi", "groot", "none"),
    "rollout.realtime": ("off", "async", "rtc"),
    "resume": ("auto", "never"),
    "on_complete": ("keep", "rotate"),
}


class ConfigError(ValueError):
    """The command line or a yaml file is wrong; the message is complete and meant for the user."""


@dataclass(frozen=True, slots=True)
class Word:
    """One override of the command line."""

    text: str  # as typed
    key: str  # dotted, without + or ~
    value: Any  # parsed by Hydra's grammar
    kind: str  # "set", "add" (+), "force" (++)


def load_config(overrides: Sequence[str], config_dir: Path = CONFIG_DIR) -> DictConfig:
    """Compose base.yaml with `overrides`; every interpolation is resolved and no key is missing.

    A lab's package can be imported from now on, by this process and those that it starts; `code` says which it is.

    Raises:
        ConfigError: unknown key or group option, wrong type, missing value, unreadable override.
    """
    overrides, lab = open_lab(overrides, config_dir)
    options = group_options(config_dir, lab)
    words = [_parse(text) for text in overrides]
    selections = [w for w in words if w.key in options]
    for word in selections:
        if str(word.value) not in (known := options[word.key]):
            raise ConfigError(f"no {word.key} is called {str(word.value)!r}{nearest(str(word.value), known)}")
    # Additions come first: a later word may set a key that an earlier one added.
    added = [w.text for w in words if w in selections or w.kind != "set"]
    base = _compose(config_dir, added, lab)
    for word in words:
        if word not in selections and word.kind == "set":
            _check_key(word, base, options)
            _check_value(word, OmegaConf.select(base, word.key))
    config = base if len(added) == len(words) else _compose(config_dir, [w.text for w in words], lab)
    for word in words:  # run=7 and run=1e3 are names, not numbers
        if word.kind == "set" and _is_plain_text(base, word) and not isinstance(word.value, str | None):
            OmegaConf.update(config, word.key, word.text.partition("=")[2])
    name = next((word.value for word in reversed(selections) if word.key == "task"), "pick")
    config = _check_task(config, _task_file(name, lab))
    if lab is not None:
        OmegaConf.update(config, "code", lab.origin())
    if config.checkpoint_path and (config.learner or config.rollout.policy == "local"):
        _settle_policy(config, [word.key for word in words])
    return config


def open_lab(words: Sequence[str], config_dir: Path = CONFIG_DIR) -> tuple[list[str], Lab | None]:
    """The other words and the lab of `--config-dir`, its package importable. ConfigError says what is wrong with it."""
    try:
        others, lab = take_lab(words, config_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if lab is not None:
        lab.use()
    return others, lab


@contextmanager
def composing(config_dir: Path, lab: Lab | None) -> Iterator[None]:
    """Meanwhile Hydra composes from these: a lab's groups in front of ours."""
    if _LabPath not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(_LabPath)
    _LabPath.folder = lab.config_dir if lab else None
    try:
        with initialize_config_dir(config_dir=str(config_dir), version_base="1.3"):
            yield
    finally:
        _LabPath.folder = None


class _LabPath(SearchPathPlugin):
    """Hydra asks it when its search path is made."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """The lab's folder comes first."""
        if self.folder is not None:
            search_path.prepend("lab", f"file://{self.folder}")


def _task_file(name: Any, lab: Lab | None) -> str:
    theirs = lab.config_dir / "task" / f"{name}.yaml" if lab else None
    return str(theirs) if theirs is not None and theirs.is_file() else f"config/task/{name}.yaml"


def _settle_policy(config: DictConfig, chosen: Sequence[str]) -> None:
    """What `checkpoint_path` says of the policy. Only who holds a policy has the launcher installed."""
    from serl_launcher.run.origin import settle_policy

    try:
        settle_policy(config, chosen)
    except (ValueError, OSError) as mistake:
        raise ConfigError(str(mistake)) from None


def group_options(config_dir: Path = CONFIG_DIR, lab: Lab | None = None) -> dict[str, list[str]]:
    """The groups (folders of config/) and the names one may select in each, a lab's included."""
    roots = [config_dir, *([lab.config_dir] if lab else [])]
    groups = sorted(p.name for p in config_dir.iterdir() if p.is_dir() and p.name not in NO_GROUPS)
    files = {group: [file for root in roots for file in (root / group).glob("*.yaml")] for group in groups}
    names = {group: sorted({f.stem for f in found if not f.stem.startswith("_")}) for group, found in files.items()}
    return {group: found for group, found in names.items() if found}


def dotted_keys(node: DictConfig | ListConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a config in the form the command line takes: `a`, `a.b`, `a.list.0.c`."""
    keys = range(len(node)) if isinstance(node, ListConfig) else node.keys()
    for key in keys:
        name = f"{prefix}{key}"
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig) and not (child._is_none() or child._is_interpolation()):
            yield from dotted_keys(child, f"{name}.")


def _parse(text: str) -> Word:
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"cannot read {text!r}: expected key=value, such as seed=3 ({reason})") from None
    if override.is_delete():
        raise ConfigError(f"{text!r} removes a key; set it to another value instead")
    if override.is_sweep_override() and override.key_or_group == "demos":  # demos=a,b
        return _parse(f"demos=[{text.partition('=')[2]}]")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} names several values; expected one (quote a text with commas)")
    kind = "force" if override.is_force_add() else "add" if override.is_add() else "set"
    return Word(text, override.key_or_group, override.value(), kind)


def _check_key(word: Word, base: DictConfig, options: dict[str, list[str]]) -> None:
    keys = list(dotted_keys(base))
    if word.key not in keys and word.key in ELSEWHERE:
        raise ConfigError(f"unknown key {word.key!r} in {word.text!r}; here it is {ELSEWHERE[word.key]}")
    if word.key not in keys:
        raise ConfigError(
            f"unknown key {word.key!r} in {word.text!r}{nearest(word.key, sorted({*keys, *options}))} "
            f"(a new key of your own: +{word.text})"
        )


def _check_value(word: Word, default: Any) -> None:
    choices = CHOICES.get(word.key)
    if choices and word.value not in choices:
        raise ConfigError(f"{word.key} is {word.value!r}; expected one of {', '.join(choices)}")
    expected = type_mismatch(word.value, default)
    if expected:
        shown = "a section" if isinstance(default, DictConfig) else repr(default)
        raise ConfigError(f"{word.key} in {word.text!r} must be {expected} (default {shown}), got {word.value!r}")


def type_mismatch(value: Any, default: Any) -> str:
    """What was expected, in words, or an empty string when `value` may replace `default`."""
    if default is None or default == "auto":
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, DictConfig):
        return "" if isinstance(value, dict) else "a section of keys; set one of its keys"
    if isinstance(default, ListConfig):
        return "" if isinstance(value, list) else "a list, such as [a,b]"
    if value is None:  # yaml's "not set"; a role that needs the key says so
        return ""
    if isinstance(default, int | float):
        # A default of 0 says nothing about fractions (rates, limits that are off).
        whole = isinstance(default, int) and default != 0
        allowed = int if whole else (int, float)
        good = isinstance(value, allowed) and not isinstance(value, bool)
        return "" if good else ("a whole number" if whole else "a number")
    return "" if isinstance(value, str | int | float) and not isinstance(value, bool) else "a text"


def _is_plain_text(base: DictConfig, word: Word) -> bool:
    default = OmegaConf.select(base, word.key)
    return isinstance(default, str) and default != "auto"


def _compose(config_dir: Path, overrides: Sequence[str], lab: Lab | None) -> DictConfig:
    try:
        with composing(config_dir, lab):
            return hydra_compose("base", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config/ does not compose: {' '.join(str(error).split())}") from None


def _check_task(config: DictConfig, file: str) -> DictConfig:
    """Resolved; the keys first, since a missing one would be an interpolation that is not found."""
    try:
        check_keys(config.task, file)
        config = _resolve(config)
        check_task(OmegaConf.to_container(config.task), file)
        check_names(config.run, config.unique_identifier)
    except ConfigError:
        raise
    except ValueError as mistake:
        raise ConfigError(str(mistake)) from None
    return config


def _resolve(config: DictConfig) -> DictConfig:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if not missing:
            OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config/ does not resolve: {' '.join(str(error).split())}") from None
    if missing:
        raise ConfigError(f"these keys need a value: {', '.join(missing)}; add {missing[0]}=<value>")
    return config
