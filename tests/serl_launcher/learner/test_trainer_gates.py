"""What holds the trainer back: the rate limiter, the accepted episodes that an online stage asks for; and weights.

The real trainer, agent and ring; only the gateway's answers are scripted.
"""

import numpy as np
import pytest
from trainer_rig import make, put


def run(trainer, gateway, told):
    """Answer report k with told[k] ticks of experience, and end; returns the steps of the stage at each report."""

    def experience():
        trainer.disk.still()  # a step counts once its checkpoint is written
        return told[len(gateway.reports) - 1]

    gateway.limit, gateway.experience = len(told), experience
    trainer.run()
    return [report["stage_steps"].get("s", 0) for report in gateway.reports]


def test_online_steps_keep_to_the_rate_of_new_transitions_and_do_so_after_a_restart(tmp_path, ring):
    for k in range(3):
        put(ring, k, "online")
    settings = {"mode": "online", "steps": 100, "trainer__max_steps_per_tick": 2.0}
    told = [500, 500, 501, 501, 503, 503, 503, 503]  # 500 were there before the stage began
    steps = run(*make(tmp_path, ring, **settings), told)
    assert all(done <= 2 * (known - 500) for done, known in zip(steps[1:], told, strict=False)), steps
    assert steps[-1] == 6  # and the rate is used

    told = [503, 503, 504, 504, 504, 504]
    steps = run(*make(tmp_path, ring, **settings), told)
    assert all(done <= 2 * (known - 500) for done, known in zip(steps[1:], told, strict=False)), steps
    assert (steps[0], steps[-1]) == (6, 8)


def test_a_train_stage_does_not_wait_for_transitions(tmp_path, ring):
    put(ring, 0, "demo")
    trainer, gateway = make(tmp_path, ring, mode="train", steps=4)
    assert run(trainer, gateway, [8] * 10)[-1] == 4


@pytest.mark.parametrize("algo", ["reject_sampling_pi0", "sac_pi0"])
@pytest.mark.parametrize(("accepted", "steps"), [(2, 0), (3, 2)])
def test_an_online_stage_waits_for_enough_accepted_episodes(tmp_path, ring, algo, accepted, steps):
    for k in range(4):  # neither demonstrations nor failures count
        put(ring, k, "demo")
        put(ring, 4 + k, "online", success=False)
    for k in range(accepted):
        put(ring, 8 + k, "online")
    trainer, _ = make(tmp_path, ring, algo, mode="online", steps=2, limit=4, algo__min_accepted=3)
    trainer.run()
    assert trainer.learner.step_count == steps


@pytest.mark.parametrize("algo", ["reject_sampling_pi0", "sft_pi0", "sac_pi0", "dsrl_pi0"])
def test_the_weights_of_the_config_are_those_of_the_imitated_chunks(tmp_path, ring, algo):
    put(ring, 0, "demo")
    put(ring, 1, "online")
    trainer, _ = make(tmp_path, ring, algo, algo__source_weights={"demo": 0.25, "autonomous": 3.0})
    trainer.data.refresh(str(ring.path))
    batch = trainer.data.sample(32)
    imitated = getattr(batch, "imitation", batch)
    np.testing.assert_array_equal(imitated.weight, np.where(imitated.demo, 0.25, 3.0))
    assert imitated.demo.any()
    assert imitated.demo.all() == (algo == "sft_pi0")
