"""What the next start says of what people asked before it, and what of it ends."""

from tiny import tiny_config

from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.paths import RunPaths
from serl_launcher.supervisor.noted import start_act


def test_a_start_ends_a_stop_and_says_what_goes_on(tmp_path) -> None:
    cfg, ledger = tiny_config(), ActsLedger(tmp_path)
    assert start_act(RunPaths(tmp_path), cfg) == []
    ledger.append({"act": "stop"}, {"act": "pause", "actor": "r1"}, {"act": "serve", "version": 3}, by="bo")
    was = cfg.algo.rule.min_return
    ledger.append({"act": "set", "key": "algo.rule.min_return", "value": 0.9, "was": was}, by="bo", time_="T")
    said = start_act(RunPaths(tmp_path), cfg)
    assert ledger.state.stopped is None
    assert said == [
        "actor r1 is paused by bo: tools/operate.py resume --actor r1",
        "policy version 3 is pinned: tools/operate.py serve latest",
        f"algo.rule.min_return=0.9 by bo (T); the config says {was}",
    ]
    cfg.algo.rule.min_return = 0.7
    assert f"it does not hold, the config says 0.7 now and said {was} then" in start_act(RunPaths(tmp_path), cfg)[-1]
    assert [row["act"] for row in ledger.rows].count("start") == 3
