"""A folder from elsewhere is data: no tool runs what it names, leaves it by a link, or shows its escape sequences."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import audit_reward
import eval_open_loop
import export_checkpoint
import merge_video
import pytest
import reaccept
import train_reward_classifier
import visualize_dataset
import yaml
from run_samples import SPEC, entries, episode, write_journal

from flowserl_cli.compose import ConfigError, load_config
from serl_launcher.learner.checkpoint import FILES, load
from serl_launcher.policies.tokens import HubTokenizer
from serl_launcher.run.files import DamagedFileError, clear, write_text
from serl_launcher.run.foreign import TRUST, check_links, foreign_config
from serl_launcher.run.parameters import find_parameters

HARMLESS = {"_target_": "serl_launcher.policies.pi0.build.build_pi0", "name": "p", "init": "random", "seed": 0}
RULE = {"_target_": "serl_launcher.replay.acceptance.SuccessRule"}
LINES = {  # a tool that builds something -> how it is started on a folder
    "export_checkpoint": lambda run: export_checkpoint.main([str(run), str(run.parent / "out")]),
    "eval_open_loop": lambda run: eval_open_loop.main([str(run), "--dataset", str(run / "dataset")]),
    "reaccept": lambda run: reaccept.main([str(run)]),
}
WRITERS = LINES | {
    "audit_reward": lambda run: audit_reward.main([str(run)]),
    "train_reward_classifier": lambda run: train_reward_classifier.main([f"run={run}"]),
}


def write_config(run: Path, **sections) -> None:
    config = {"task": {"spec": SPEC.to_dict()}, "policy": HARMLESS, "rollout": {"execute_horizon": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"algo": {"rule": RULE}} | sections))


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    write_journal(folder, entries([episode(0), episode(1)]))
    (folder / "dataset" / "meta").mkdir(parents=True)
    (folder / "dataset" / "meta" / "info.json").write_text('{"total_episodes": 0}')
    return folder


class Traced:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


ATTACKS = {
    "a loader": ("policy", {"_target_": "torch.load", "f": "MARK.pt", "weights_only": False}),
    "a call": ("policy", {"_target_": "os.mkdir", "_args_": ["MARK"]}),
    "nested": ("policy", HARMLESS | {"size": {"_target_": "os.mkdir", "_args_": ["MARK"]}}),
    "in a list": ("policy", HARMLESS | {"more": [{"deep": {"_target_": "os.mkdir", "_args_": ["MARK"]}}]}),
    "partial": ("policy", {"_target_": "os.mkdir", "_partial_": True, "_args_": ["MARK"]}),
    "through a module of ours": ("policy", {"_target_": "serl_launcher.run.files.os.mkdir", "_args_": ["MARK"]}),
    "a function of ours": ("policy", {"_target_": "serl_launcher.run.files.write_text", "path": "MARK", "text": ""}),
    "eval": ("policy", {"_target_": "builtins.eval", "_args_": ["__import__('os').mkdir('MARK')"]}),
    "no text": ("policy", {"_target_": ["os.mkdir"]}),
    "served": ("algo", {"rule": RULE, "served": {"_target_": "os.mkdir", "_args_": ["MARK"]}}),
    "rule": ("algo", {"rule": {"_target_": "os.mkdir", "_args_": ["MARK"]}}),
    "escape": ("algo", {"rule": {"_target_": "os.\x1b[2Jmkdir"}}),
}  # fmt: skip


@pytest.mark.parametrize(("tool", "attack"), [
    (tool, attack) for tool in LINES for attack, (section, _) in ATTACKS.items()
    if section == "algo" or tool != "reaccept"  # which builds nothing of the policy
])  # fmt: skip
def test_what_a_folder_names_is_not_run(tool, attack, run, tmp_path, capsys):
    section, node = ATTACKS[attack]
    mark = tmp_path / "mark"
    write_config(run, **{section: eval(repr(node).replace("MARK", str(mark)))})
    (tmp_path / "mark.pt").write_bytes(pickle.dumps(Traced(mark)))
    assert LINES[tool](run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.rstrip("\n").isprintable()
    for part in (str(run / "config.yaml"), f"{section}", "._target_: ", "is nothing that this project's config/ names"):
        assert part in error
    assert f"set {TRUST}=" in error
    assert not mark.exists()


@pytest.mark.parametrize("side", [["learner=true", "schedule=eval"], ["actor=true", "rollout.policy=local", "ip=null"]])
def test_a_checkpoint_path_gives_no_target_to_a_start(side, run):
    write_config(run, policy={"_target_": "torch.load", "f": "x.pt"})
    with pytest.raises(ConfigError, match=r"policy\._target_: 'torch\.load' is nothing that this project's"):
        load_config([*side, f"checkpoint_path={run}"])


def test_a_package_of_the_users_may_be_trusted_and_nothing_behind_it(run, tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text("import os\nclass Policy: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_config(run, policy={"_target_": "my_lab.Policy"})
    with pytest.raises(ValueError, match=f"set {TRUST}=my_lab$"):
        foreign_config(run, builds=("policy",))
    foreign_config(run)  # nothing of it is built
    monkeypatch.setenv(TRUST, "other, my_lab")
    assert foreign_config(run, builds=("policy",)).policy._target_ == "my_lab.Policy"
    for target in ("my_lab.os.mkdir", "my_labs.Policy"):
        write_config(run, policy={"_target_": target})
        with pytest.raises(ValueError, match=f"'{target}' is nothing that"):
            foreign_config(run, builds=("policy",))


@pytest.mark.parametrize("group", ["policy", "algo"])
def test_every_config_of_ours_may_be_read_back(group, run, repo_root):
    for name in sorted(path.stem for path in (repo_root / "config" / group).glob("[!_]*.yaml")):
        words = [f"{group}={name}"] + (["policy.init=random", "policy.action_horizon=8"] if group == "policy" else [])
        config = load_config(words)
        (run / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(_yaml(config))))
        foreign_config(run, builds=("policy", "algo", "trainer"))


def _yaml(config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(config, resolve=True)


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("link", ["reward_audit.json", "modality.json", "open_loop", "params/latest.json", "journal"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_read_or_written(tool, link, run, tmp_path, capsys):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    write_config(run)
    (run / "params").mkdir()
    target = victim if link in ("open_loop", "journal") else victim / "file"
    if link == "journal":
        (run / "journal").rename(run / "journal.old")
    (run / link).symlink_to(target)
    assert WRITERS[tool](run) == 2
    error = capsys.readouterr().err
    assert f"{run / link} is a link to '{target}', out of the folder" in error
    assert sorted(path.name for path in victim.iterdir()) == ["file"]
    assert (victim / "file").read_text() == "precious"


def test_links_that_stay_inside_or_that_the_user_made_are_followed(run, tmp_path, monkeypatch):
    (run / "newest").symlink_to("journal")
    check_links(run)
    (tmp_path / "big").mkdir()
    (run / "dataset.big").symlink_to(tmp_path / "big")
    with pytest.raises(ValueError, match=f"set {TRUST}='{tmp_path / 'big'}'"):
        check_links(run)
    monkeypatch.setenv(TRUST, str(tmp_path / "big"))
    check_links(run)
    run.rename(tmp_path / "moved")
    run.symlink_to(tmp_path / "moved")  # the folder itself may be reached through one
    check_links(run)


def test_an_optimizers_state_is_data_too(tmp_path):
    folder = tmp_path / "step_000001"
    folder.mkdir()
    (folder / FILES[1]).write_bytes(pickle.dumps(Traced(tmp_path / "mark")))
    with pytest.raises(DamagedFileError, match="cannot be read"):
        load(folder)
    assert not (tmp_path / "mark").exists()


def test_a_tokenizers_folder_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nclass Tok: pass\n")
    named = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"policy\.tokenizer=.*cannot be loaded"):
        HubTokenizer(str(tmp_path), 48)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "..", ".x", "a\nb"])
def test_a_pointer_to_parameters_stays_in_its_folder(name, tmp_path):
    entry = {"version": 1, "step": 1, "file": name, "bytes": 1, "sha256": "", "time": 0.0}
    (tmp_path / "latest.json").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=r"latest\.json: file: expected a name"):
        find_parameters(tmp_path)


def test_a_dataset_leads_to_no_file_out_of_it(tmp_path):
    row = {"videos/x/chunk_index": 0, "videos/x/file_index": 0, "data/chunk_index": 0, "data/file_index": 0}
    for feature, info in (("video", {"video_path": "../{video_key}.mp4"}), ("image", {"data_path": "/etc/passwd"})):
        info |= {"features": {"x": {"dtype": feature, "shape": [4, 4, 3]}}}
        with pytest.raises(ValueError, match="a file out of the folder"):
            next(merge_video.read_episode(tmp_path, info, row))


def test_a_table_shows_no_escape_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize_dataset, "episodes", lambda root: [{"episode_id": "\x1b[2J\x1b[31mowned\n"}])
    table = visualize_dataset.episode_table(tmp_path)
    assert table.count("\n") == 1
    assert "\\x1b[2J" in table


def test_a_link_where_a_file_is_written_is_moved_aside_and_what_it_leads_to_stays(tmp_path):
    """Of `path` itself and of the file beside it in which a write begins, out of the folder and to a neighbour."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    run.mkdir()
    mine.write_text("mine")
    (run / "kept.json").write_text("kept")
    for name, target in (("a", mine), ("b", run / "kept.json"), ("c", tmp_path / "nothing"), ("d", tmp_path)):
        for path in (run / name, run / f"{name}.part"):
            path.symlink_to(target)
        clear(run / name)
        assert not os.path.lexists(run / name)
        (run / name).symlink_to(target)
        write_text(run / name, "new")
        assert (run / name).read_text() == "new"
        assert not (run / name).is_symlink()
    assert (mine.read_text(), (run / "kept.json").read_text()) == ("mine", "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]
    assert all(path.is_symlink() for path in run.glob("*.damaged-*"))
