"""The one entry point of every run: compose the config and be the actor or the learner.

    python examples/train_rlpd.py actor=true   [algo= policy= task= ip= unique_identifier= any.key=value]
    python examples/train_rlpd.py learner=true [algo= policy= task= schedule= checkpoint_path= any.key=value]

The run scripts of examples/experiments/ and start.sh call it. --dry-run prints the resolved config and ends.
--config-dir FOLDER: a lab's own groups and package (docs/your_lab.md).
Exit codes: 0 done, 2 a mistake of the user (one message on stderr), 3 gave up (said why), 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

# Before anything imports numpy or torch: several processes share the machine, and threads under contention are slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing of a default run comes from the hub; HF_HUB_OFFLINE=0 lets a policy of yours fetch its weights.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from omegaconf import DictConfig, OmegaConf

from flowserl_cli.compose import ConfigError, group_options, load_config, open_lab
from flowserl_cli.lab import FLAG, joined


def main(argv: Sequence[str]) -> int:
    """Run one side; returns the process's exit code."""
    try:
        argv = joined(argv)
        flags = {word for word in argv if word.startswith("-") and not word.startswith(f"{FLAG}=")}
        if flags & {"-h", "--help"}:
            print(_help([word for word in argv if word.startswith(f"{FLAG}=")]))
            return 0
        if flags - {"--dry-run"}:
            raise ConfigError(f"unknown flag {min(flags - {'--dry-run'})!r}; there are --dry-run, --help and {FLAG}")
        config = load_config([word for word in argv if word not in flags])
        side = chosen_side(config)
    except ValueError as error:
        print(f"train_rlpd: {error}", file=sys.stderr)
        return 2
    if flags:
        print(f"# {side}\n{OmegaConf.to_yaml(config)}", end="")
        return 0
    if side == "actor":
        from serl_robot_infra.main import main as run_side
    else:
        from serl_launcher.supervisor.main import main as run_side
    return run_side(config)


def chosen_side(config: DictConfig) -> str:
    """`actor` or `learner`; exactly one of the two keys must be true."""
    if config.actor == config.learner:
        got = "both" if config.actor else "neither"
        raise ConfigError(f"expected exactly one of actor=true and learner=true, got {got}")
    return "actor" if config.actor else "learner"


def _help(words: Sequence[str]) -> str:
    _, lab = open_lab(words)
    groups = "\n".join(f"  {name}=  {' | '.join(options)}" for name, options in group_options(lab=lab).items())
    return f"{__doc__}\nGroups:\n{groups}\nEvery other key, with its default: config/base.yaml"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
