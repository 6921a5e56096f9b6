"""Train a reward classifier from the labelled episodes of a run, and say how good it is on held-out ones.

    python examples/train_reward_classifier.py run=runs/quickstart [kind=outcome|process] [any key of the yaml]

Settings: config/reward_classifier.yaml. Writes reward.safetensors, reward.json and plots to <run>/reward; serve it with
`reward=classifier reward.model=<run>/reward` on both sides. Exit codes: 0 done, 2 a mistake of the user.
"""

import os
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flowserl_cli.compose import CONFIG_DIR, ConfigError, type_mismatch
from serl_config.nearest import nearest
from serl_launcher.run.foreign import foreign_config
from serl_transport.contract.specs import TaskSpec


def main(argv: Sequence[str]) -> int:
    """Train; returns the process's exit code."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{(CONFIG_DIR / 'reward_classifier.yaml').read_text()}")
        return 0
    try:
        run(read_settings(argv))
    except (ConfigError, ValueError, OSError) as mistake:
        print(f"train_reward_classifier: {mistake}", file=sys.stderr)
        return 2
    return 0


def read_settings(argv: Sequence[str]) -> DictConfig:
    """The yaml with key=value words over it. ConfigError names a word that is wrong."""
    settings = OmegaConf.load(CONFIG_DIR / "reward_classifier.yaml")
    known = [*settings, *(f"fit.{key}" for key in settings.fit)]
    for word in argv:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {word!r}: expected key=value, such as seed=3")
        if key not in known:
            raise ConfigError(f"unknown key {key!r}{nearest(key, known)}")
    return OmegaConf.merge(settings, *(_read(word, settings) for word in argv))


def _read(word: str, settings: DictConfig) -> DictConfig:
    """The one key. ConfigError when it is unreadable, or its value is of another kind than in `settings`."""
    key = word.partition("=")[0]
    try:
        given = OmegaConf.from_dotlist([word])
        OmegaConf.resolve(given)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read {word!r}: {str(error).splitlines()[0]}") from None
    value = OmegaConf.select(given, key)
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    expected = type_mismatch(value, OmegaConf.select(settings, key))
    if key == "cameras" and value is not None and not isinstance(value, list):
        expected = f"a list, such as [{value}]"
    if key in ("seed", "run") and value is None:
        expected = "given"
    if key == "seed" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        expected = "a whole number of at least 0"
    if expected:
        raise ConfigError(f"{key} in {word!r} must be {expected}, got {value!r}")
    return given


def _spec_of(folder: Path) -> TaskSpec:
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"run={folder}: expected a run folder with config.yaml and a journal")
    config = foreign_config(folder, "task.spec")
    return TaskSpec.from_dict(OmegaConf.to_container(config.task.spec, resolve=True))


def run(settings: DictConfig) -> None:
    """Journal to classifier."""
    import numpy as np

    from serl_launcher.replay.episodes import journal_episodes
    from serl_launcher.rewards.labels import label_episodes, split_by_episode
    from serl_launcher.rewards.model import RewardCard, save
    from serl_launcher.rewards.training import Fit, plot, train

    folders = [Path(name) for name in str(settings.run).split(",")]
    specs = [_spec_of(folder) for folder in folders]
    spec = specs[0]
    for folder, other in zip(folders, specs, strict=True):
        if lines := other.differences(spec, f"of {folder}", f"of {folders[0]}"):
            raise ValueError("run: the runs are of different tasks:\n  " + "\n  ".join(lines))
    cameras = tuple(settings.cameras or spec.cameras)
    unknown = [camera for camera in cameras if camera not in spec.cameras]
    if unknown:
        raise ValueError(f"cameras: expected some of {', '.join(spec.cameras)}, got {', '.join(unknown)}")
    card = RewardCard(
        kind=settings.kind,
        classes=2 if settings.kind == "outcome" else settings.stages,
        cameras=cameras,
        image_size=settings.image_size,
        use_state=settings.use_state,
        task=spec.to_dict(),
        patience=settings.patience,
    )
    found = chain.from_iterable(journal_episodes(folder, spec) for folder in folders)
    episodes, unjudged = label_episodes(
        found, cameras, settings.kind, settings.stages, settings.positive, settings.margin
    )
    if unjudged:
        print(f"left out: {unjudged} episodes that only a classifier judged; tools/audit_reward.py --relabel takes a")
        print("  person's word on them", flush=True)
    shares = (settings.validation_share, settings.test_share)
    split = split_by_episode(episodes, shares, settings.kind, np.random.default_rng(settings.seed))
    print(f"episodes: {len(split.train)} train, {len(split.validation)} validation, {len(split.test)} test", flush=True)
    model, card, figures = train(split, card, Fit(**settings.fit), settings.seed)
    out = Path(str(settings.out or folders[0] / "reward"))
    save(out, model, card, figures)
    plot(figures, card.kind, out)
    for key, value in figures.items():
        if key not in ("precision", "recall"):
            print(f"  {key}: {value}")
    print(f"{out}: serve it with reward=classifier reward.model={out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
