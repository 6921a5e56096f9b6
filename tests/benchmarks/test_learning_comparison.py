"""The learning comparison: a tiny run goes from demonstrations to the last evaluation, and rows become medians."""

import json
import sys
from pathlib import Path

import pytest

TINY = ["demos=2", "clone_steps=6", "env_steps=150", "eval_episodes=1", "curve_every=70", "curve_episodes=1"]


@pytest.mark.parametrize(
    "variant", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("rejection", "sac")), "sft"]
)
def test_a_tiny_run_trains_at_the_asked_ratio(variant, tmp_path, capsys):
    import learning

    words = [*(f"budget.{word}" for word in TINY), "trainer.batch_size=8"]
    learning.one(variant, "pick", "pi0_tiny", 0, [*words, "budget.offline_steps=5"] if variant == "sft" else words)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert rows[0]["point"] == "before"
    assert rows[0]["optimizer_steps"] == 6
    assert rows[-1]["point"] == "after"
    assert all(0 <= row["success_rate"] <= 1 for row in rows)
    if variant == "sft":
        assert (rows[-1]["optimizer_steps"], rows[-1]["env_steps"]) == (11, 0)
    else:
        assert [row["point"] for row in rows[1:-1]] == ["curve"] * 2
        assert rows[-1]["env_steps"] >= 150
        assert rows[-1]["optimizer_steps"] == 6 + int(0.25 * 150)
        assert rows[-1]["interventions"] > 0


def test_a_classifier_gives_the_rewards_and_the_environment_has_the_last_word(tmp_path, capsys):
    import learning
    from omegaconf import OmegaConf

    from flowserl_cli.compose import load_config
    from serl_launcher.rewards.model import RewardCard, RewardClassifier, save

    spec = OmegaConf.to_container(load_config(["task=pick"]).task.spec, resolve=True)
    card = RewardCard("outcome", 2, ("wrist",), 16, False, spec, threshold=0.0)  # whatever it sees is success
    save(tmp_path / "reward", RewardClassifier(card), card, {})
    words = ["demos=2", "clone_steps=3", "env_steps=12", "eval_episodes=2", "curve_every=0"]
    model = f"reward.model={tmp_path}/reward"
    learning.one("rejection_classifier", "pick", "pi0_tiny", 0, [*(f"budget.{word}" for word in words), model])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["success_rate"] for row in rows] == [0, 0]
    assert (rows[0]["demo_steps"], rows[1]["episodes"], rows[1]["env_steps"]) == (2, 12, 12)


def test_rows_become_medians_and_a_picture(tmp_path):
    import learning

    rows = []
    for seed, rate in enumerate((0.2, 0.9, 0.8)):
        head = {"algo": "x", "policy": "p", "task": "t", "seed": seed, "words": [], "recent_intervention_rate": None}
        more = {"episodes": 3, "interventions": 1, "minutes": 1.0}
        rows += [
            head | more | {"point": point, "env_steps": steps, "success_rate": value}
            for point, steps, value in (("before", 0, 0.1), ("curve", 10, rate / 2), ("after", 20, rate))
        ]
    (table,) = learning.medians(rows)
    assert (table["before"], table["after"], table["each"]) == (0.1, 0.8, [0.2, 0.9, 0.8])
    picture = tmp_path / "curves.png"
    learning.draw(rows, picture)
    assert picture.stat().st_size > 5000
    assert learning.median_curve(learning.curves_of(rows, "env_steps", "success_rate"))[-1] == (20, 0.8)


def test_the_median_of_seeds_that_were_measured_at_different_places():
    import learning

    fine = [(0, 0.0), (1, 0.2), (2, 0.4), (4, 0.4), (4, 0.6)]  # the later of two at one place counts
    coarse, other = [(0, 0.2), (2, 0.6)], [(0, 0.4), (3, 1.0)]
    assert learning.median_curve([fine, coarse, other]) == [(0, 0.2), (2, 0.6)]
    assert learning.median_curve([fine]) == [(0, 0.0), (1, 0.2), (2, 0.4), (4, 0.6)]
    assert learning.median_curve([]) == []


def test_help_in_the_first_and_the_last_quarter():
    import learning

    def point(kind, seed, steps, episodes, helped):
        return {"point": kind, "seed": seed, "env_steps": steps, "episodes": episodes, "interventions": helped}

    def seed(number, *helped):  # after 25, 50, 76 and 101 ticks, 10 episodes each
        places = zip((25, 50, 76, 101), (10, 20, 30, 40), helped, strict=True)
        return [point("before", number, 0, 0, 0), *(point("curve", number, *at) for at in places)]

    rows = seed(0, 8, 9, 10, 12) + seed(1, 4, 5, 6, 10) + seed(2, 6, 7, 8, 9)
    # 0.8 to 0.2, 0.4 to 0.4, 0.6 to 0.1.
    assert learning.help_rates(rows) == (0.6, 0.2)
    assert learning.help_rates([point("before", 0, 0, 0, 0), point("after", 0, 0, 0, 0)]) is None


def test_ablations_are_drawn_apart_beside_plain_rejection_sampling():
    import learning

    def row(algo, *words):
        return {"algo": algo, "words": list(words)}

    plain, other = row("rejection", "budget.curve_every=3000"), row("rejection", "task.operator.takeover_tick=9")
    ablation, sac, lerobot = row("rejection_no_human"), row("sac"), row("lerobot_sac_10hz")
    drawn = learning.pictures([plain, other, ablation, sac], Path("a/learning_t.jsonl"))
    assert drawn == {
        Path("a/learning_t.png"): [plain, other, sac],
        Path("a/learning_t_ablations.png"): [plain, ablation],
    }
    assert learning.pictures([lerobot], Path("s.jsonl")) == {Path("s.png"): [lerobot]}
    assert learning.pictures([], Path("s.jsonl")) == {}


def test_an_unknown_budget_is_named(monkeypatch):
    import learning

    with pytest.raises(SystemExit, match=r"no budget\.demonstrations"):
        learning.one("sft", "pick", "pi0_tiny", 0, ["budget.demonstrations=3"])
    assert "lockstep" in sys.modules
