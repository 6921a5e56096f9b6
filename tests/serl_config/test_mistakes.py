"""What is said of a wrapped exception."""

from itertools import pairwise

from serl_config.mistakes import is_config_mistake, mistake_message


def chained(*links):
    """The first of the exceptions, each caused by the next."""
    for error, cause in pairwise(links):
        error.__cause__ = cause
    return links[0]


def test_careful_words_are_kept_whole_and_not_replaced_by_what_caused_them():
    wrapped = chained(Exception("Error in call to target"), ValueError("a: expected 1\n  got 2"), RuntimeError("deep"))
    assert mistake_message(wrapped) == "a: expected 1\n  got 2"
    assert is_config_mistake(wrapped)
    assert mistake_message(chained(ValueError("plain"), RuntimeError("deep"))) == "plain"


def test_what_the_interpreter_says_gets_its_key_and_one_line():
    wrapped = chained(Exception("Error in call to target 'f'\nfull_key: algo.rule"), TypeError("no argument x\nmore"))
    assert mistake_message(wrapped) == "algo.rule: no argument x"
    assert is_config_mistake(wrapped)


def test_a_failing_machine_is_no_mistake_of_the_user():
    assert not is_config_mistake(chained(Exception("Error in call to target"), RuntimeError("out of memory")))
