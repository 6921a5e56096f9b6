"""Secrets in a config: what counts as one, where references lead, and what is left when they are hidden."""

import os

import pytest
from omegaconf import OmegaConf

from flowserl_cli.compose import load_config
from serl_config.secrets import HIDDEN, check_private, literal_secrets, secret, without_secrets

WORD = "s3cret-w0rd"


@pytest.mark.parametrize(
    "key",
    ["token", "openpi_token", "api_key", "apikey", "wandb_api_key", "password", "db_passwd", "client_secret", "secrets",
     "TOKEN", "hf_token", "credentials", "private_key", "tokens"],
)  # fmt: skip
def test_a_word_under_a_key_of_a_secret_is_hidden_wherever_it_stands(key):
    config = {"a": [{"b": {key: WORD}}], key: [WORD, {"inner": WORD}], "plain": "stays", "n": 3}
    shown = without_secrets(config)
    assert WORD not in str(shown)
    assert shown["a"][0]["b"][key] == HIDDEN
    assert (shown["plain"], shown["n"]) == ("stays", 3)
    assert config["a"][0]["b"][key] == WORD
    assert set(literal_secrets(config)) == {f"a.0.b.{key}", key}


@pytest.mark.parametrize(
    "key", ["prompt_tokens", "tokenizer", "token_count", "keys_dir", "openpi_tls_key", "secretary"]
)
def test_other_keys_are_left_alone(key):
    assert without_secrets({key: "32"}) == {key: "32"}
    assert list(literal_secrets({key: "32"})) == []


@pytest.mark.parametrize("value", [None, "env:NAME", "file:/etc/token", True])
def test_what_is_no_secret_itself_may_stay(value):
    assert without_secrets({"token": value}) == {"token": value}
    assert list(literal_secrets({"token": value})) == []


def test_the_defaults_hold_no_secret_and_lose_nothing():
    config = OmegaConf.to_container(load_config([]), resolve=True)
    assert without_secrets(config) == config
    assert list(literal_secrets(config)) == []


def test_a_secret_is_given_as_it_is_or_by_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBOT_TOKEN", WORD)
    path = tmp_path / "token"
    path.write_text(WORD + "\n")
    path.chmod(0o600)
    assert secret(None, "k") is None
    assert secret(WORD, "k") == secret("env:ROBOT_TOKEN", "k") == secret(f"file:{path}", "k") == WORD
    assert secret(1234, "k") == "1234"


@pytest.mark.parametrize(
    ("value", "words"),
    [("env:NOT_SET", "k=env:NOT_SET: the environment has no NOT_SET"), ("file:{}/none", "k: no file"),
     ("file:{}/empty", "the file is empty"), ("file:{}/open", "can be read by others (mode 0644): chmod 600")],
)  # fmt: skip
def test_a_reference_that_leads_nowhere_is_one_line(tmp_path, value, words):
    for name, mode in (("empty", 0o600), ("open", 0o644)):
        (tmp_path / name).write_text(WORD if name == "open" else "")
        (tmp_path / name).chmod(mode)
    with pytest.raises(ValueError) as raised:
        secret(value.format(tmp_path), "k")
    assert words in str(raised.value)
    assert WORD not in str(raised.value)


def test_a_file_for_its_owner_alone(tmp_path):
    path = tmp_path / "key.pem"
    path.touch()
    os.chmod(path, 0o640)
    check_private(path, "k", others=0o007)
    with pytest.raises(ValueError, match="mode 0640"):
        check_private(path, "k")
