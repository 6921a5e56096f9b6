"""How often a training step reads a value back from the device: each time the host waits for it.

Every way from a tensor to a Python value is counted. On the host's own tensors the count is the same as on a GPU.
"""

import sys
from collections import Counter

import pytest
import torch
from trainer_rig import make, put

from serl_launcher.learner.stage import TrainingStage

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """Reads since the last `clear`, by name."""
    counter: Counter[str] = Counter()

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            # On a CPU Adam reads its own step counts; its fused kernel on a GPU does not.
            counter[name] += not sys._getframe(1).f_globals["__name__"].startswith("torch.optim")
            return original(self, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return counter


def reads_of_steps(trainer, mode, reads):
    """One Counter for each of ten steps."""
    stage, found = TrainingStage("s", mode, 100), []
    trainer.learner.begin_stage(mode)
    for _ in range(10):
        reads.clear()
        assert trainer.take_step(stage, 1000)
        found.append(+reads)
    return found


def test_a_step_that_is_not_logged_reads_back_one_bool_whether_it_is_finite(tmp_path, ring, reads):
    put(ring, 0, "demo")
    trainer, _ = make(tmp_path, ring, trainer__log_period=5, trainer__checkpoint_period=100)
    trainer.data.refresh(str(ring.path))
    found = reads_of_steps(trainer, "train", reads)
    unlogged = [count for k, count in enumerate(found, 1) if k % 5]
    assert unlogged == [{"__bool__": 1}] * 8
    assert found[4]["__float__"] == found[9]["__float__"] >= 5  # and on a logged step the metrics are


@pytest.mark.parametrize("algo", ["sac_pi0", "dsrl_pi0"])
def test_the_metrics_of_an_agent_with_values_wait_for_the_logged_step_too(tmp_path, ring, reads, algo):
    for k in range(3):
        put(ring, 2 * k, "demo")
        put(ring, 2 * k + 1, "online")
    small = {"algo__agent__warmup_steps": 1}
    trainer, _ = make(tmp_path, ring, algo, trainer__log_period=5, trainer__checkpoint_period=100, **small)
    trainer.data.refresh(str(ring.path))
    found = reads_of_steps(trainer, "online", reads)
    unlogged = [count for k, count in enumerate(found, 1) if k % 5]
    # Beside the learner's bool: |Q| against q_limit, and the count of online steps that the agents keep in a tensor.
    assert max(count.total() for count in unlogged) <= 4, unlogged
    assert found[4]["__float__"] >= 10
