"""Mistakes that people make with data, statistics and config, made on purpose: is each refused or named by its name?

    python benchmarks/seeded_mistakes.py [--rows FILE]

Each mistake is made in a copy of one good set of demonstrations (a six-joint arm) and its config; what tools/why.py,
which includes preflight's look at the data, says of it must hold the words that name it. Ten clean sets, three of them
of the project's own simulators, must raise nothing. Prints a line each; FILE gets them as JSON lines.
tests/tools/test_why.py runs it too.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools"), str(Path(__file__).resolve().parent)]

from _seeded_sets import CLEAN, Case, arm, write  # noqa: E402
from why import look  # noqa: E402

Mistake = Callable[[Case], None]
MISTAKES: dict[str, tuple[str, Mistake]] = {}  # what was done -> the words that name it, and who does it


def mistake(what: str, names: str) -> Callable[[Mistake], Mistake]:
    """Register one; `names`: a pattern that a finding must hold."""

    def keep(make: Mistake) -> Mistake:
        MISTAKES[what] = (names, make)
        return make

    return keep


def by_key(what: str, names: str, key: str, value: object) -> None:
    """A mistake that is one key of the config."""
    mistake(what, names)(lambda case: case.set(key, value))


# Metadata and task.
by_key("the task runs at 10 Hz, the data at 30", r"fps: the dataset has 30", "task.spec.control_hz", 10.0)
by_key(
    "a camera of another name",
    r"camera 'top': the dataset has no 'top'",
    "task.spec.cameras",
    {"top": [24, 32], "wrist": [24, 32]},
)
by_key("a camera of another size", r"camera 'front': 24×32 is of another shape", "task.spec.cameras.front", [48, 48])
by_key("another prompt", r"prompt: the task says 'fold", "task.spec.prompt", "fold the towel")
by_key("the prompt in capitals", r"prompt: the task says", "task.spec.prompt", "Put The Pen Away")


@mistake("a joint fewer in the task", r"state: the task leaves out")
def _(case: Case) -> None:
    for part in ("names", "low", "high"):
        for what in ("state", "action"):
            case.set(f"task.spec.{what}_{part}", case.spec[f"{what}_{part}"][:5])


@mistake("actions of another robot", r"action: 6 dims .*, the task has 7")
def _(case: Case) -> None:
    case.set("task.spec.action_names", [*case.spec["action_names"], "base"])
    case.set("task.spec.action_low", [*case.spec["action_low"], -1.0])
    case.set("task.spec.action_high", [*case.spec["action_high"], 1.0])


@mistake("an empty task text", r"empty task text")
def _(case: Case) -> None:
    case.tasks([" "])


# Statistics.
@mistake("statistics without std", r"observation.state: std is absent")
def _(case: Case) -> None:
    case.stats(lambda stats: stats["observation.state"].pop("std"))


@mistake("NaN in the statistics", r"action: std is absent, of another size or holds NaN")
def _(case: Case) -> None:
    case.stats(lambda stats: stats["action"]["std"].__setitem__(1, float("nan")))


@mistake("std 0 of a dim that moves", r"observation.state dim 2: .*std 0, the rows")
def _(case: Case) -> None:
    case.stats(lambda stats: stats["observation.state"]["std"].__setitem__(2, 0.0))


@mistake("statistics in radians, data in degrees", r"statistics are not the data's")
def _(case: Case) -> None:
    def radians(stats):
        for name in ("mean", "std", "min", "max"):
            stats["action"][name] = [x / 57.3 for x in stats["action"][name]]

    case.stats(radians)


@mistake("statistics of another dataset", r"statistics are not the data's")
def _(case: Case) -> None:
    case.stats(lambda stats: stats["observation.state"]["mean"].__setitem__(0, 55.0))


@mistake("statistics in another order of the joints", r"statistics are not the data's")
def _(case: Case) -> None:
    def reverse(stats):
        for name in ("mean", "std"):
            stats["observation.state"][name] = stats["observation.state"][name][::-1]

    case.stats(reverse)


@mistake("a checkpoint's statistics of another robot", r"normalisation does not fit: state")
def _(case: Case) -> None:
    case.checkpoint(scale=0.02)


@mistake("a checkpoint's statistics a hundred times too wide", r"normalisation does not fit: (state|action): the wid")
def _(case: Case) -> None:
    case.checkpoint(scale=100.0)


@mistake("the task's ranges a hundred times too wide", r"normalisation does not fit: (state|action): the widest")
def _(case: Case) -> None:
    for what in ("state", "action"):
        for end, sign in (("low", -1), ("high", 1)):
            case.set(f"task.spec.{what}_{end}", [sign * 9000.0] * 6)


# Values.
@mistake("one NaN in the states", r"episode 1, frame 20: observation.state holds nan in dim 2")
def _(case: Case) -> None:
    case.state[70, 2] = np.nan


@mistake("one Inf in the actions", r"episode 0, frame 10: action holds inf in dim 1")
def _(case: Case) -> None:
    case.action[10, 1] = np.inf


@mistake("the operator waits before each episode", r"idle frames: nothing moves in \d+%")
def _(case: Case) -> None:
    for first, end in case.episodes():
        stop = first + int(0.6 * (end - first))
        case.state[first:stop], case.action[first:stop] = case.state[stop], case.state[stop]


@mistake("pauses all over", r"idle frames")
def _(case: Case) -> None:
    for first, end in case.episodes():
        for at in range(first, end - 10, 10):
            case.state[at : at + 6], case.action[at : at + 6] = case.state[at], case.state[at]


@mistake("the state recorded as the action", r"state equal to action: .*the state of its own tick")
def _(case: Case) -> None:
    case.action[:] = case.state


@mistake("the state of a tick ago recorded as the action", r"state equal to action: .*a tick ago")
def _(case: Case) -> None:
    case.action[1:] = case.state[:-1].copy()


@mistake("actions written five ticks late", r"actions behind the state")
def _(case: Case) -> None:
    for first, end in case.episodes():
        case.action[first + 5 : end] = case.action[first : end - 5].copy()


@mistake("deltas recorded under the joints' names", r"deltas where positions are meant|changes, not targets")
def _(case: Case) -> None:
    case.action[:-1] = np.diff(case.state, axis=0)
    case.action[-1] = 0


@mistake("positions recorded as deltas", r"positions where deltas are meant|the dataset's dims are .* the task's")
def _(case: Case) -> None:
    case.set("task.spec.action_names", [f"d{name}" for name in case.spec["action_names"]])


@mistake("the gripper's sign", r"sign: 'gripper' moves 'gripper' the other way")
def _(case: Case) -> None:
    case.action[:, 5] = 100 - case.action[:, 5]


@mistake("the gripper's sign in two of six episodes", r"sign differs between episodes: 'gripper' .* 2 of 6")
def _(case: Case) -> None:
    for first, end in case.episodes()[:2]:
        case.action[first:end, 5] = 100 - case.action[first:end, 5]


@mistake("a joint's sign", r"sign: 'pan' moves 'pan' the other way")
def _(case: Case) -> None:
    case.action[:, 0] *= -1


@mistake("two joints exchanged in the actions", r"order of the dims: 'lift' follows 'flex'")
def _(case: Case) -> None:
    case.action[:, [1, 3]] = case.action[:, [3, 1]]


@mistake("a gripper of 0 to 1 beside a state of 0 to 100", r"scale: 'gripper' covers")
def _(case: Case) -> None:
    case.action[:, 5] /= 100


@mistake(
    "a gripper of 0 to 100 in a task of 0 to 1", r"action dim 'gripper': 90 .* outside the task's 0 to 1: other units"
)
def _(case: Case) -> None:
    case.set("task.spec.action_low.5", 0.0)
    case.set("task.spec.action_high.5", 1.0)


@mistake("degrees in a task of radians", r"other units, or changes in place of targets")
def _(case: Case) -> None:
    for what in ("state", "action"):
        for end in ("low", "high"):
            case.set(f"task.spec.{what}_{end}", [x / 57.3 for x in case.spec[f"{what}_{end}"]])


by_key("limits narrower than the data", r"clipped actions: 'lift'", "task.spec.action_high.1", 10.0)


@mistake("a speed limit below the demonstrations", r"clipped actions: 'pan'.*faster than 5/s")
def _(case: Case) -> None:
    case.set("task.safety", {"max_speed": {"pan": 5.0}})
    case.set("task.spec.targets", {"pan": "pan"})


@mistake("states read at a third of the rate", r"stale observations")
def _(case: Case) -> None:
    for first, end in case.episodes():
        kept = first + np.arange(end - first) // 3 * 3
        case.state[first:end] = case.state[kept]


@mistake("ticks of 80 ms at 30 Hz", r"ticks late: a tick took 80 ms")
def _(case: Case) -> None:
    case.column("complementary_info.time_ns", "int64", np.arange(len(case.state)) * 80_000_000)


# Cameras.
@mistake("cameras exchanged in two of six episodes", r"camera swap: .* 2 of 6 episodes")
def _(case: Case) -> None:
    for first, end in case.episodes()[:2]:
        front, wrist = case.pictures["front"][first:end], case.pictures["wrist"][first:end]
        case.pictures["front"][first:end], case.pictures["wrist"][first:end] = wrist, front


@mistake("a camera that froze", r"frozen camera: 'wrist'")
def _(case: Case) -> None:
    for first, end in case.episodes()[:3]:
        case.pictures["wrist"][first:end] = [case.pictures["wrist"][first]] * (end - first)


@mistake("a black camera", r"black camera: 'front'")
def _(case: Case) -> None:
    case.pictures["front"] = [case.black] * len(case.state)


@mistake("one camera under both names", r"camera order: 'front' and 'wrist' are the same picture")
def _(case: Case) -> None:
    case.pictures["front"] = list(case.pictures["wrist"])


by_key(
    "cameras crossed on their way to the policy", r"camera order: 'front' is given to the policy as 'wrist'",
    "policy.cameras", {"front": "wrist", "wrist": "front"},
)  # fmt: skip

# Execution.
by_key("more ticks executed than a chunk holds", r"chunk too short", "rollout.execute_horizon", 16)
by_key("chunks longer than the episodes", r"episodes shorter than a chunk", "policy.action_horizon", 200)
by_key("the actor at a third of the rate", r"slower than trained", "rollout.rate_hz", 10.0)


@mistake("answers later than their chunk", r"latency beyond the chunk")
def _(case: Case) -> None:
    case.status = {"serving": {"p99_ms": 400.0}}


@mistake("answers later than the executed ticks", r"latency beyond the executed ticks")
def _(case: Case) -> None:
    case.status = {"serving": {"p99_ms": 180.0}}


@mistake("driven with another prompt than trained with", r"prompt unknown to training: trained with 'open the drawer'")
def _(case: Case) -> None:
    case.trained(prompt="open the drawer")


@mistake("trained with the joints in another order", r"order of the dims: actions were")
def _(case: Case) -> None:
    case.trained(action_names=case.spec["action_names"][::-1])


@mistake("trained at another rate", r"another rate: trained at 50 Hz")
def _(case: Case) -> None:
    case.trained(control_hz=50.0)


@mistake("trained with the cameras in another order", r"camera order: it saw \['wrist', 'front'\]")
def _(case: Case) -> None:
    case.trained(cameras={"wrist": [24, 32], "front": [24, 32]})


def said(case: Case) -> list[str]:
    """What is found, or why it is refused."""
    case.save()
    try:
        return look(OmegaConf.create(case.cfg), case.folder, case.status)
    except (ValueError, OSError) as refusal:
        return [str(refusal)]


def seeded(good: Path, cfg: dict, folder: Path, chosen: list[str] | None = None) -> list[dict]:
    """A row for each mistake: is it named, and by which line."""
    rows = []
    for what in chosen or list(MISTAKES):
        names, make = MISTAKES[what]
        place = folder / f"m{list(MISTAKES).index(what)}"
        shutil.copytree(good, place)
        case = Case(place, json.loads(json.dumps(cfg)))
        make(case)
        found = said(case)
        hit = next((line for line in [*found, "\n".join(found)] if re.search(names, line)), None)
        rows.append({"name": what, "named": hit is not None, "said": (hit or "; ".join(found))[:300]})
        shutil.rmtree(place)
    return rows


def clean(folder: Path) -> list[dict]:
    """A row for each clean set: what is said of it, which should be nothing."""
    rows = []
    for name, make in CLEAN.items():
        made = make()
        case = Case(*write(folder / name, made))
        alarms = [line for line in said(case) if not line.startswith("note: ")]
        rows.append({"name": f"clean: {made.what}", "alarms": alarms})
    return rows


def main() -> int:
    """Exit 0 when all but two mistakes are named and no clean set raises an alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="JSON lines are written here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        good, cfg = write(Path(place) / "good", arm())
        rows = [*clean(Path(place)), *seeded(good, cfg, Path(place))]
    for row in rows:
        good = not row["alarms"] if "alarms" in row else row["named"]
        print(f"{'ok    ' if good else 'MISSED'} {row['name']}: {row.get('said') or row.get('alarms') or 'nothing'}")
    mistakes = [row for row in rows if "named" in row]
    named, alarms = sum(row["named"] for row in mistakes), sum(bool(row.get("alarms")) for row in rows)
    total = {"name": "total", "mistakes": len(mistakes), "named": named, "clean": len(rows) - len(mistakes)}
    total["alarms"] = alarms
    print(total)
    if args.rows:
        args.rows.write_text("".join(json.dumps(row) + "\n" for row in [*rows, total]))
    return 0 if named >= len(mistakes) - 2 and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
