"""docs/algorithms/your_own.md: its two files, as they stand on the page, compose, train and are published."""

import re
import shutil
import sys

import numpy as np
import pytest
import trainer_rig
from tiny import ROOT, SPEC

import serl_launcher.agents
from flowserl_cli.compose import CONFIG_DIR, ConfigError, load_config
from serl_launcher.replay.ring import RingWriter
from serl_launcher.run.parameters import PublishedVersion
from serl_launcher.telemetry.metrics import read_metrics

PAGE = ROOT / "docs" / "algorithms" / "your_own.md"
FILES = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S))
MODULE = "serl_launcher/serl_launcher/agents/return_weighted.py"


@pytest.fixture
def config_dir(tmp_path, monkeypatch):
    """A copy of config/ with the page's yaml; the page's module is importable under its name."""
    config_dir = shutil.copytree(CONFIG_DIR, tmp_path / "config")
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    path = [*serl_launcher.agents.__path__, str((tmp_path / MODULE).parent)]
    monkeypatch.setattr(serl_launcher.agents, "__path__", path)
    monkeypatch.setattr("configured.CONFIG_DIR", config_dir)
    yield config_dir
    sys.modules.pop("serl_launcher.agents.return_weighted", None)


def test_the_page_shows_one_file_and_one_yaml():
    assert list(FILES) == [MODULE, "config/algo/return_weighted_pi0.yaml"]


def test_the_commands_of_the_page_compose(config_dir):
    for line in re.findall(r"^bash start.sh (.*)$", PAGE.read_text(encoding="utf-8"), re.M):
        assert load_config(line.split(), config_dir).algo.name == "return_weighted_pi0"
    assert load_config(["algo=return_weighted_pi0", "algo.agent.beta=0.02"], config_dir).algo.agent.beta == 0.02
    with pytest.raises(ConfigError, match=r"did you mean 'algo\.agent\.beta'"):
        load_config(["algo=return_weighted_pi0", "algo.agent.bta=0.02"], config_dir)


def test_it_learns_from_successes_and_failures_and_is_published(config_dir, tmp_path):
    ring = RingWriter(SPEC, 300, tmp_path, shared=tmp_path)
    for ordinal in range(8):
        trainer_rig.put(ring, ordinal, "demo" if ordinal < 2 else "online", success=ordinal % 2 == 0)
    trainer, _ = trainer_rig.make(
        tmp_path / "run", ring, "return_weighted_pi0", "online", steps=60, trainer__batch_size=16,
        trainer__optimizer__lr=3e-3, trainer__warmup_steps=5, trainer__checkpoint_period=100,
    )  # fmt: skip
    trainer.run()
    ring.close()
    rows = read_metrics(tmp_path / "run/metrics/trainer.jsonl")
    losses = [row["losses/flow"] for row in rows]
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < 0.75 * np.mean(losses[:15]), losses
    assert {row["replay/chunks"] for row in rows} == {64.0}  # all eight ticks of all eight episodes
    # Half of each batch comes from the two demonstrations, of which one failed: some rewards, some none.
    assert all(0 < row["batch/return_to_go"] < 1 for row in rows)
    assert PublishedVersion.read(tmp_path / "run/params").step == 60
