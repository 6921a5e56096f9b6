"""A training step reads no value back from the device: each time the host would wait for it.

Every way from a tensor to a Python value is counted. On the host's own tensors the count is the same as on a GPU.
"""

from collections import Counter

import pytest
import torch
from trainer_rig import make, put

from serl_launcher.learner.stage import TrainingStage

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__", "__contains__")


@pytest.fixture
def reads(monkeypatch):
    """Reads since the last `clear`, by name."""
    counter: Counter[str] = Counter()

    def counted(name):
        original = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            counter[name] += self is not counter.on_host
            return original(self, *args, **kwargs)

        return read

    counter.on_host = None
    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return counter


@pytest.mark.parametrize(
    ("algo", "mode"),
    [
        ("reject_sampling_pi0", "train"),
        ("sac_pi0", "train"),
        ("sac_pi0", "online"),
        ("dsrl_pi0", "online"),
        ("best_of_n_pi0", "online"),
        ("advantage_weighted_pi0", "online"),
    ],
)
def test_only_a_logged_step_reads_back_and_does_so_once(tmp_path, ring, reads, algo, mode):
    for k in range(3):
        put(ring, 2 * k, "demo")
        put(ring, 2 * k + 1, "online")
    changes = {"trainer__log_period": 3, "trainer__publish_period": 100, "trainer__checkpoint_period": 100}
    changes |= {} if algo.startswith("reject") else {"algo__agent__warmup_steps": 1}
    trainer, _ = make(tmp_path, ring, algo, **changes)
    # Online steps are counted on the host, whatever the device.
    reads.on_host = getattr(trainer.learner.agent, "online_steps", None)
    trainer.data.refresh(str(ring.path))
    stage, found = TrainingStage("s", mode, 100), []
    trainer.learner.begin_stage(mode)
    for _ in range(6):
        reads.clear()
        assert trainer.take_step(stage, 1000)
        found.append(+reads)
    assert found == [{}, {}, {"tolist": 1}] * 2
    assert len(trainer.step_log.shown) >= 13


@pytest.mark.gpu
@pytest.mark.parametrize(
    "algo", ["reject_sampling_pi0", "sac_pi0", "dsrl_pi0", "best_of_n_pi0", "advantage_weighted_pi0"]
)
def test_no_step_waits_for_the_card(tmp_path, ring, algo):
    """CUDA's own word: whatever synchronises, copies from pageable memory included, is an error."""
    for k in range(3):
        put(ring, 2 * k, "demo")
        put(ring, 2 * k + 1, "online")
    changes = {} if algo.startswith("reject") else {"algo__agent__warmup_steps": 1}
    trainer, _ = make(tmp_path, ring, algo, trainer__device="auto", **changes)
    trainer.data.refresh(str(ring.path))
    trainer.learner.begin_stage("online")
    for _ in range(3):
        trainer.learner.step(trainer.data.sample(4), 1.0)
    batch = trainer.data.sample(4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.learner.step(batch, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
