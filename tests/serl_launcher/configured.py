"""Settings and rules as config/ has them, for tests: the values are in the yaml alone. `changes` are a test's own."""

from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import CONFIG_DIR


def composed(*words: str) -> DictConfig:
    """config/base.yaml with these words, interpolations left alone; a copy of one's own."""
    return _composed(words).copy()


@cache
def _composed(words: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        config = compose("base", overrides=list(words))
    OmegaConf.set_struct(config, False)
    return config


def agent_settings(algo: str, **changes: Any) -> Any:
    """The settings of an algorithm, such as `sac_pi0`."""
    return instantiate(composed(f"algo={algo}").algo.agent, _convert_="all", **changes)


def rule(name: str = "success", **changes: Any) -> Any:
    """An acceptance rule, such as `success`, that looks at every action dimension."""
    return instantiate(composed(f"rule={name}").algo.rule, _convert_="all", **({"noop_dims": None} | changes))
