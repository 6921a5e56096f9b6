"""One place for each default: settings and rules have fields without values, and no yaml repeats what it inherits."""

from dataclasses import MISSING, fields, make_dataclass
from pathlib import Path

import pytest
from configured import composed
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import CONFIG_DIR, group_options

OPTIONS = group_options()
NODES = [("algo", name, "algo.agent") for name in OPTIONS["algo"]] + [("rule", n, "algo.rule") for n in OPTIONS["rule"]]


def unlike_its_class(node: DictConfig) -> list[str]:
    """Keys of a node that its dataclass lacks, fields that the node leaves out, fields with a default of their own."""
    own = fields(get_class(node._target_))
    names, keys = {field.name for field in own}, set(node) - {"_target_"}
    with_default = {f.name for f in own if f.default is not MISSING or f.default_factory is not MISSING}
    return [
        *(f"unknown {key}" for key in sorted(keys - names)),
        *(f"missing {name}" for name in sorted(names - keys)),
        *(f"default of {name}" for name in sorted(with_default)),
    ]


def repeated(file: Path) -> list[str]:
    """Keys to which a yaml gives the value that the ones in its `defaults` have given already."""
    own = OmegaConf.load(file)
    parents = OmegaConf.create({})
    for name in own.pop("defaults", []):
        if isinstance(name, str) and name != "_self_":
            parents = OmegaConf.merge(parents, whole(file.with_name(f"{name}.yaml")))
    inherited = dict(leaves(parents))
    return [key for key, value in leaves(own) if key in inherited and inherited[key] == value]


def whole(file: Path) -> DictConfig:
    """A yaml with those that it inherits from."""
    own = OmegaConf.load(file)
    parents = [whole(file.with_name(f"{n}.yaml")) for n in own.pop("defaults", []) if isinstance(n, str) and n[1:]]
    return OmegaConf.merge(*parents, own)


def leaves(node: DictConfig, prefix: str = ""):
    """Dotted keys and their values, interpolations as they are written."""
    for key, value in OmegaConf.to_container(node).items():
        if isinstance(value, dict) and value:
            yield from leaves(node[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize(("group", "name", "key"), NODES)
def test_yaml_and_dataclass_name_the_same_fields_and_only_the_yaml_has_values(group, name, key):
    assert unlike_its_class(OmegaConf.select(composed(f"{group}={name}"), key)) == []


@pytest.mark.parametrize(
    "file", [*CONFIG_DIR.glob("algo/*.yaml"), *CONFIG_DIR.glob("rule/*.yaml")], ids=lambda f: f.stem
)
def test_a_yaml_says_only_what_differs(file):
    assert repeated(file) == []


def test_both_checks_find_what_they_look_for(tmp_path, monkeypatch):
    target = make_dataclass("Settings", [("tau", float), ("steps", int), ("widths", tuple, (1,))])
    monkeypatch.setattr("configured.Settings", target, raising=False)
    node = OmegaConf.create({"_target_": "configured.Settings", "tau": 1, "tua": 2, "widths": [1]})
    assert unlike_its_class(node) == ["unknown tua", "missing steps", "default of widths"]

    (tmp_path / "first.yaml").write_text("agent: {tau: 0.1, widths: [1], steps: '${seed}'}\n")
    (tmp_path / "second.yaml").write_text("defaults: [first]\nagent: {tau: 0.2}\n")
    (tmp_path / "third.yaml").write_text(
        "defaults: [second, override /rule: x]\nagent: {tau: 0.2, widths: [1, 2], steps: '${seed}', more: 1}\n"
    )
    assert repeated(tmp_path / "second.yaml") == []
    assert repeated(tmp_path / "third.yaml") == ["agent.tau", "agent.steps"]
