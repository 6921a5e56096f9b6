"""Composition: what a mistake on the command line says, and what a right one gives."""

import re
import shutil

import pytest
import train_rlpd
from omegaconf import OmegaConf

from flowserl_cli.compose import ConfigError, dotted_keys, group_options, load_config
from flowserl_cli.elsewhere import ELSEWHERE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo=reject_samplng_pi0", "did you mean 'reject_sampling_pi0'"),
        (
            "task=zzz",
            "no task is called 'zzz'; there are dobot_pnp, dobot_pnp_tool, fetch_pick_and_place, fetch_reach, ",
        ),
        ("prt=1", "unknown key 'prt' in 'prt=1'; did you mean 'port'"),
        ("training.num_gpus=8", "unknown key 'training.num_gpus' in 'training.num_gpus=8'; here it is launch.num_proc"),
        ("logging.logger=wandb", "here it is telemetry.wandb=true"),
        ("broadcastport=1", "did you mean 'broadcast_port'?"),
        ("rollout.mod=demo", "did you mean 'rollout.mode'"),
        ("policy.size.widht=3", "did you mean 'policy.size.width'"),
        ("batch_size=3", "did you mean 'trainer.batch_size'"),
        ("schedule.stages.99.steps=5", "did you mean 'schedule.stages."),
        ("rollout.mode=train", "expected one of follow, demo, online, eval"),
        ("port=abc", "port in 'port=abc' must be a whole number (default 5588), got 'abc'"),
        ("trainer.batch_size=2.5", "must be a whole number"),
        ("trainer.ema_decay=high", "must be a number"),
        ("insecure=1", "must be true or false"),
        ("task.spec=3", "must be a section of keys"),
        ("schedule.stages=3", "must be a list"),
        ("runs_dir=[a]", "must be a text"),
        ("seed", "expected key=value"),
        ("a b=1", "expected key=value"),
        ("~port", "removes a key"),
        ("port=1,2", "names several values"),
        ("+policy.extra=???", "these keys need a value: policy.extra"),
        ("run=${nowhere}", "does not resolve"),
        (
            "+task.saftey={max_speed: {dx: 1}}",
            "task.saftey (config/task/pick.yaml or the command line): unknown key; did",
        ),
        ("task.safety={max_sped: {dx: 1}}", "config/task/pick.yaml: task.safety.max_sped: unknown key; did you mean"),
        ("task.noop_dims=[7]", "task.noop_dims: expected a list of numbers from 0 to 3"),
        ("task.rate_hz=fast", "task.rate_hz"),
        ("+task.spec.cameras.side=64", "config/task/pick.yaml: task spec: cameras.side: expected [height, width]"),
    ],
)
def test_a_mistake_is_one_clear_message(override, message):
    with pytest.raises(ConfigError) as raised:
        load_config([override])
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize("text", ["name: mine\nspec: {a: [1\n", "a: 1: 2\n", "- a list\n"])
def test_a_syntax_error_in_a_yaml_is_one_message_with_its_file(text, tmp_path, repo_root):
    with pytest.raises(ConfigError, match=r"config/ does not compose: .*mine") as raised:
        load_config(["task=mine"], own_task(repo_root, tmp_path, text))
    assert str(raised.value).count("\n") == 0


def test_groups_keys_and_values_are_taken():
    words = "task=pick_gym_hil algo=sft_pi0 schedule=sft schedule.stages.0.steps=7 seed=3 run=007 rollout.rate_hz=7.5"
    more = "rollout.episodes=2 exporter.video=true +mine.own=[1,2] mine.own=[3]"
    config = load_config([*words.split(), *more.split()])
    assert (config.task.name, config.algo.name, config.seed, config.run) == ("pick_gym_hil", "sft_pi0", 3, "007")
    assert config.schedule.stages[0].steps == 7
    assert (config.rollout.rate_hz, config.rollout.episodes, config.exporter.video) == (7.5, 2, True)
    assert config.mine.own == [3]


def test_every_option_of_every_group_composes():
    options = group_options()
    assert {"task", "policy", "algo", "schedule"} <= set(options)
    for group, names in options.items():
        for name in names:
            where = {"rule": "algo.rule"}.get(group, group)
            assert OmegaConf.select(load_config([f"{group}={name}"]), where) is not None


def test_an_algorithm_brings_its_rule_and_one_that_is_named_wins():
    def rule(*words):
        return load_config(words).algo.rule

    assert rule("algo=sft_groot")._target_.endswith("DemonstrationRule")
    assert rule("algo=sft_pi0", "rule=success", "algo.rule.min_return=0.8").min_return == 0.8
    assert rule("rule=demonstration")._target_.endswith("DemonstrationRule")
    with pytest.raises(ConfigError, match=r"did you mean 'algo\.rule\.min_return'"):
        load_config(["rule.min_return=0.8"])


@pytest.mark.parametrize("algorithm", ["sac", "dsrl", "sft", "reject_sampling"])
@pytest.mark.parametrize("family", ["pi0", "pi05", "groot"])
def test_an_algorithm_of_another_family_brings_that_familys_policy(algorithm, family):
    config = load_config([f"algo={algorithm}_{family}"])
    assert (config.algo.name, config.policy.name) == (f"{algorithm}_{family}", f"{family}_tiny")


def test_a_policy_that_is_named_wins_over_the_algorithms_own():
    assert load_config(["algo=sac_groot", "policy=groot_n1_7"]).policy.name == "groot_n1_7"
    assert load_config(["policy=pi05", "algo=sac_pi05"]).policy.name == "pi05"


def test_dotted_keys_reach_into_lists_and_sections():
    config = OmegaConf.create({"a": {"b": 1}, "rows": [{"c": 2}, 3], "none": None})
    assert list(dotted_keys(config)) == ["a", "a.b", "rows", "rows.0", "rows.0.c", "rows.1", "none"]


@pytest.mark.parametrize("words", [[], ["actor=true", "learner=true"]])
def test_exactly_one_side(words, capsys):
    assert train_rlpd.main(words) == 2
    assert "exactly one of actor=true and learner=true" in capsys.readouterr().err


def test_an_unknown_flag_is_named(capsys):
    assert train_rlpd.main(["actor=true", "--fast"]) == 2
    assert "unknown flag '--fast'" in capsys.readouterr().err


def test_dry_run_prints_the_resolved_config(capsys):
    assert train_rlpd.main(["learner=true", "seed=11", "--dry-run"]) == 0
    side, _, text = capsys.readouterr().out.partition("\n")
    assert side == "# learner"
    assert OmegaConf.create(text).seed == 11


def test_help_lists_the_groups(capsys):
    assert train_rlpd.main(["--help"]) == 0
    assert "reject_sampling_pi0" in capsys.readouterr().out


def own_task(repo_root, tmp_path, text):
    config_dir = shutil.copytree(repo_root / "config", tmp_path / "config")
    (config_dir / "task" / "mine.yaml").write_text(text)
    return config_dir


def test_the_template_of_a_robot_composes_and_is_no_task_itself(repo_root, tmp_path):
    assert "_template" not in group_options()["task"]
    text = (repo_root / "config" / "task" / "_template.yaml").read_text()
    config = load_config(["task=mine"], own_task(repo_root, tmp_path, text))
    assert config.task.env.prompt == "put the part into the tray"
    assert config.rollout.rate_hz is None
    assert config.algo.rule.noop_dims == [0, 1, 2]
    assert config.rollout.demo_noise == "auto"
    assert list(config.task.safety.max_speed) == ["dx", "dy", "dz"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("noop_dims", None),
        ("  max_ticks", "config/task/mine.yaml: missing key 'spec.max_ticks'"),
        ("env", "config/task/mine.yaml: missing key 'env': the environment's class, {_target_: "),
        ("  _target_: serl_robot_infra.envs", "config/task/mine.yaml: task.env: expected {_target_: <module>.<class>"),
        ("spec", "config/task/mine.yaml: missing key 'spec'"),
    ],
)
def test_what_a_robot_s_yaml_leaves_out_is_named_or_has_a_default(repo_root, tmp_path, line, message):
    lines = (repo_root / "config" / "task" / "_template.yaml").read_text().splitlines()
    start = next(i for i, text in enumerate(lines) if text.startswith(line))
    depth = len(line) - len(line.lstrip())
    end = start + 1
    while len(lines[end]) - len(lines[end].lstrip()) > depth:
        end += 1
    config_dir = own_task(repo_root, tmp_path, "\n".join(lines[:start] + lines[end:]))
    if message is None:
        assert load_config(["task=mine"], config_dir).task.noop_dims is None
        return
    with pytest.raises(ConfigError) as raised:
        load_config(["task=mine"], config_dir)
    assert message in str(raised.value)


@pytest.fixture
def finished_run(tmp_path):
    """A run that trained the expert of a PI0.5 with DSRL."""
    words = ["learner=true", "policy=pi05", "policy.checkpoint=/data/pi05", "policy.train=expert", "seed=3"]
    config = load_config(words)
    config.algo = load_config(["algo=dsrl_pi05"]).algo
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "v000001.safetensors").touch()
    OmegaConf.save(config, tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize("side", [["learner=true", "schedule=eval"], ["actor=true", "rollout.policy=local", "ip=null"]])
@pytest.mark.parametrize("inside", ["", "params/v000001.safetensors"])
def test_an_evaluation_takes_policy_and_algorithm_from_its_run(finished_run, side, inside):
    config = load_config([*side, f"checkpoint_path={finished_run / inside}"])
    theirs = OmegaConf.load(finished_run / "config.yaml")
    assert (config.policy, config.algo) == (theirs.policy, theirs.algo)
    assert config.policy.seed == 3
    assert config.seed == 0


def test_what_the_user_types_of_a_policy_stands(finished_run):
    words = ["learner=true", "schedule=eval", f"checkpoint_path={finished_run}"]
    moved = ["policy=pi05", "policy.checkpoint=/elsewhere", "policy.train=expert"]
    config = load_config([*words, *moved])
    assert config.policy.checkpoint == "/elsewhere"
    assert "served" in config.algo


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["policy=pi05", "schedule=eval"], "policy.train is full, but the run of checkpoint_path="),
        (["policy=pi05"], "had expert: its parameters fit only that; set policy.train=expert"),
        (["policy=pi0_tiny"], "policy.train is full, but the run of checkpoint_path="),
    ],
)
def test_parameters_of_a_run_that_trained_something_else_are_refused(finished_run, words, message):
    with pytest.raises(ConfigError) as raised:
        load_config(["learner=true", f"checkpoint_path={finished_run}", *words])
    assert message in str(raised.value)
    assert str(raised.value).count("\n") == 0


def test_flags_of_groot_are_compared_and_shown_as_they_are_typed(tmp_path):
    config = load_config(["policy=groot_n1_7", "policy.tune.llm=true"])
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"set policy\.tune=\{llm:true,visual:false,") as raised:
        load_config(["learner=true", "policy=groot_n1_7", f"checkpoint_path={tmp_path}"])
    again = str(raised.value).rpartition("set ")[2]
    assert load_config(["learner=true", "policy=groot_n1_7", f"checkpoint_path={tmp_path}", again]).policy.tune.llm


def test_demos_may_be_one_source_several_or_mappings():
    assert load_config(["demos=/data/lab"]).demos == "/data/lab"
    assert load_config(["demos=/data/lab,someone/pick"]).demos == ["/data/lab", "someone/pick"]
    mapped = load_config(["demos=[{source: /data/lab, cameras: {front: top}}]"]).demos
    assert mapped == [{"source": "/data/lab", "cameras": {"front": "top"}}]


def test_every_word_of_another_project_is_answered_with_a_key_that_there_is():
    keys = {*dotted_keys(load_config([])), "policy.precision"}  # a key of the full-size policies
    for word, answer in ELSEWHERE.items():
        assert word not in keys
        assert re.match(r"[a-z_.]+", answer)[0].rstrip(".") in keys, word
