"""A start of the learner is an act itself, and what people asked of the run before it is said. Called by the main.

An operator's stop ends with it; pauses, verdicts, settings and a pinned version go on.
"""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from serl_launcher.run.acts import ActsLedger
from serl_launcher.run.in_force import InForce
from serl_launcher.run.live_settings import in_force
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.record import user


def start_act(paths: RunPaths, cfg: DictConfig) -> list[str]:
    """Keep the start in the ledger of acts; lines for the screen. OSError: it cannot be written."""
    ledger = ActsLedger(paths.root)
    ledger.append({"act": "start"}, by=user())
    return list(_holds(ledger.state, cfg))


def _holds(state: InForce, cfg: DictConfig) -> Iterator[str]:
    if state.paused:
        yield f"actors are paused by {state.paused}: tools/operate.py resume lets them go on"
    for actor, by in state.paused_actors.items():
        yield f"actor {actor} is paused by {by}: tools/operate.py resume --actor {actor}"
    if state.training_paused:
        yield f"training is paused by {state.training_paused}: tools/operate.py training_resume"
    if state.served is not None:
        yield f"policy version {state.served} is pinned: tools/operate.py serve latest"
    if not state.settings and not state.ended:
        return
    live = in_force(OmegaConf.to_container(cfg, resolve=True), state)
    for key, row in live.settings.items():
        yield f"{key}={row.value} by {row.by} ({row.time}); the config says {row.was}"
    yield from live.passed_over
    for name in live.ended:
        yield f"stage {name} was ended by an operator and stays so; give it another goal to go on with it"
