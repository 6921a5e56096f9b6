"""What is said of a wrapped exception."""

from itertools import pairwise

from serl_transport.mistakes import of_the_user, said


def chained(*links):
    """The first of the exceptions, each caused by the next."""
    for error, cause in pairwise(links):
        error.__cause__ = cause
    return links[0]


def test_careful_words_are_kept_whole_and_not_replaced_by_what_caused_them():
    wrapped = chained(Exception("Error in call to target"), ValueError("a: expected 1\n  got 2"), RuntimeError("deep"))
    assert said(wrapped) == "a: expected 1\n  got 2"
    assert of_the_user(wrapped)
    assert said(chained(ValueError("plain"), RuntimeError("deep"))) == "plain"


def test_what_the_interpreter_says_gets_its_key_and_one_line():
    wrapped = chained(Exception("Error in call to target 'f'\nfull_key: algo.rule"), TypeError("no argument x\nmore"))
    assert said(wrapped) == "algo.rule: no argument x"
    assert of_the_user(wrapped)


def test_a_failing_machine_is_no_mistake_of_the_user():
    assert not of_the_user(chained(Exception("Error in call to target"), RuntimeError("out of memory")))
