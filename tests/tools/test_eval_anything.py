"""Open-loop evaluation of whatever holds parameters, as it is named: and of nothing else."""

import json

import eval_open_loop
import pytest
from checkpoints import make_tokenizer
from sft_samples import make_dataset
from test_eval_open_loop import publish_tiny
from tiny import SPEC

from serl_launcher.policies.pi0.build import build_pi0
from serl_launcher.policies.pi0.tiny import TinySize
from serl_launcher.run.parameters import find_parameters

TINY = ["policy=pi0_tiny", "policy.size.conv_stem=false", "+policy.size.vocabulary=512", "serving.device=cpu"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in LeRobot's layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = str(make_tokenizer(folder / "words"))
    size = TinySize(conv_stem=False, vocabulary=512)
    return build_pi0("t", SPEC, "random", 0, 4, size, tokenizer=words).save(folder / "pi0")


def evaluated(source, dataset, output, *words):
    options = ["--dataset", str(dataset), "--episodes", "0", "--output", str(output)]
    assert eval_open_loop.main([str(source), *words, *options]) == 0
    return json.loads((output / "open_loop.json").read_text())


@pytest.mark.slow
def test_a_file_and_a_folder_of_a_run_are_that_run(dataset, tmp_path):
    publish_tiny(tmp_path / "run")
    figures = [
        evaluated(tmp_path / "run" / source, dataset, tmp_path / "out")["policy"]
        for source in ("", "params/v000003.safetensors")
    ]
    assert figures[0] == figures[1]


def test_a_checkpoints_folder_is_judged_on_the_task_that_the_dataset_describes(dataset, checkpoint, tmp_path, capsys):
    told = evaluated(checkpoint, dataset, tmp_path / "out", *TINY)
    assert (told["policy_version"], told["stride"]) == (0, 4)
    assert "1 episodes, 20 ticks, the parameters of that folder" in capsys.readouterr().out


def test_what_is_nothing_of_the_kind_is_refused_in_one_line(dataset, checkpoint, tmp_path, capsys):
    for source, words, told in (
        (
            tmp_path,
            [],
            "not a run folder (no config.yaml), nothing in one, and no checkpoint's folder (no config",
        ),
        (checkpoint, ["--version", "best"], "is a checkpoint's folder, which is one version"),
        (checkpoint, ["policy=pi05_tiny"], "expected a checkpoint of type pi05, got 'pi0'"),
    ):
        assert eval_open_loop.main([str(source), *words, "--dataset", str(dataset)]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_a_checkpoints_folder_as_checkpoint_path_is_told_which_key_takes_it(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"give it as policy.checkpoint=.*pi0 with the policy= of its type"):
        find_parameters(checkpoint)
