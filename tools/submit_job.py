#!/usr/bin/env python
"""A run, or a sweep of runs, as jobs of a cluster: `submit=<name>` is a yaml of config/submit/, a queue's preset.

    .venv/bin/python tools/submit_job.py submit=slurm submit.partition=gpu task=pick seed=0,1,2 submit.actors=8
    .venv/bin/python tools/submit_job.py submit=slurm submit.dry_run=true launch=nodes submit.nodes=2 algo=sac_pi0

Words with `submit.` set the job, the others are the run's, as for run_learner.sh. A key with several values is a sweep:
a job each, `run` numbered. What would be run is printed; with submit.dry_run=true nothing else happens. A job that
reaches its time limit, or is preempted, ends its run in order and is queued again: the run goes on in its folder.

Exit codes: 0 submitted or shown, 1 the queue refused, 2 a mistake in the words.
"""

import needs_learner  # noqa: F401

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowserl_cli.compose import CONFIG_DIR, ConfigError, load_config
from flowserl_cli.job import Job

ROOT = Path(__file__).resolve().parents[1]
PRESETS = CONFIG_DIR / "submit"


def preset(words: Sequence[str]) -> DictConfig:
    """The queue of `submit=` with what `submit.<key>=` changes. ConfigError names the word."""
    chosen = [word.partition("=")[2] for word in words if word.startswith("submit=")]
    known = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    if not chosen or chosen[-1] not in known:
        raise ConfigError(f"submit={chosen[-1] if chosen else ''}: expected one of {', '.join(known)}")
    queue = OmegaConf.load(PRESETS / f"{chosen[-1]}.yaml")
    for word in words:
        key, _, value = word.removeprefix("submit.").partition("=")
        if not word.startswith("submit."):
            continue
        if key.partition(".")[0] not in queue:
            raise ConfigError(f"submit.{key}: expected one of {', '.join(map(str, queue))}")
        try:
            OmegaConf.update(queue, key, OmegaConf.create(f"x: {value}").x)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{word}: {error}") from None
    for key in ("actors", "nodes", "gpus_per_node", "cpus_per_task", "minutes", "times", "grace_s", "parallel"):
        if key not in queue:  # a local job has no nodes
            continue
        least = 0 if key in ("actors", "gpus_per_node") else 1
        if not isinstance(queue[key], int) or isinstance(queue[key], bool) or queue[key] < least:
            raise ConfigError(f"submit.{key}: expected a whole number of at least {least}, got {queue[key]!r}")
    if queue.cluster not in ("slurm", "local"):
        raise ConfigError(f"submit.cluster: expected slurm or local, got {queue.cluster!r}")
    if 60 * queue.minutes <= queue.grace_s:
        raise ConfigError(f"submit.minutes={queue.minutes}: expected more than submit.grace_s={queue.grace_s} seconds")
    return queue


def runs_of(words: Sequence[str]) -> list[list[str]]:
    """The words of each run: the product of those with several values. ConfigError as `load_config`."""
    try:
        parsed = [(word, OverridesParser.create().parse_override(word)) for word in words]
    except HydraException as error:
        raise ConfigError(f"cannot read the words: {str(error).splitlines()[0]}") from None
    choices = [
        [f"{word.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override() and override.key_or_group != "demos"
        else [word]
        for word, override in parsed
    ]
    runs = [list(each) for each in itertools.product(*choices)]
    named = [word.partition("=")[2] for word in words if word.startswith("run=")]
    base = named[-1] if named else "job"
    if len(runs) == 1:
        return [[*runs[0], *([] if named else [f"run={base}"])]]
    others = [[word for word in run if not word.startswith("run=")] for run in runs]
    return [[*run, f"run={base}-{number}"] for number, run in enumerate(others)]


def executor_of(queue: DictConfig, folder: Path) -> Any:
    """submitit's, set as the preset says."""
    import submitit

    python = queue.python or sys.executable
    if queue.cluster == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=queue.times, python=python)
        executor.update_parameters(timeout_min=queue.minutes, signal_delay_s=queue.grace_s, setup=list(queue.setup))
        return executor
    executor = submitit.SlurmExecutor(folder, max_num_timeout=queue.times, python=python)
    executor.update_parameters(**slurm_parameters(queue))
    return executor


def slurm_parameters(queue: DictConfig) -> dict[str, Any]:
    """sbatch's options in submitit's names; what is null is left to the queue."""
    wanted = {
        "job_name": "flowserl",
        "time": queue.minutes,
        "nodes": queue.nodes,
        "ntasks_per_node": 1,  # one learner a node; its trainer starts a process for each GPU (launch=several)
        "gpus_per_node": queue.gpus_per_node or None,
        "cpus_per_task": queue.cpus_per_task,
        "mem": f"{queue.mem_gb}GB",
        "partition": queue.partition,
        "account": queue.account,
        "qos": queue.qos,
        "constraint": queue.constraint,
        "array_parallelism": queue.parallel,
        "signal_delay_s": queue.grace_s,
        "setup": list(queue.setup) or None,
        "additional_parameters": OmegaConf.to_container(queue.more) or None,
        "stderr_to_stdout": True,
    }
    return {key: value for key, value in wanted.items() if value is not None}


def script(queue: DictConfig, folder: Path, jobs: int) -> str:
    """The sbatch script as submitit writes it, but for the name of the pickle."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{queue.python or sys.executable} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = slurm_parameters(queue) | ({"map_count": jobs} if jobs > 1 else {})
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def main(argv: Sequence[str]) -> int:
    """Check, show, submit."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        queue = preset(argv)
        runs = runs_of([word for word in argv if not word.startswith(("submit=", "submit."))])
        for words in runs:  # every run of the sweep composes, or none is submitted
            load_config([*words, "learner=true", *_node_words(queue)])
    except ValueError as error:
        print(f"submit_job: {error}", file=sys.stderr)
        return 2
    folder = ROOT / queue.folder
    jobs = [Job(words, ROOT, queue.actors) for words in runs]
    for number, words in enumerate(runs):
        beside = f"   + {queue.actors} actors" if queue.actors else ""
        print(f"# job {number}: bash run_learner.sh {shlex.join([*words, *_node_words(queue)])}{beside}")
    if queue.dry_run:
        slurm = queue.cluster == "slurm"
        print(script(queue, folder, len(jobs)) if slurm else f"# processes here, {queue.parallel} at a time")
        return 0
    return submit(queue, folder, jobs)


def _node_words(queue: DictConfig) -> list[str]:
    """What job.py adds on the first of several nodes, for the check and the print."""
    nodes = queue.get("nodes", 1)
    return [] if nodes == 1 else [f"launch.num_machines={nodes}", "launch.main_host=FIRST-NODE"]


def submit(queue: DictConfig, folder: Path, jobs: Sequence[Job]) -> int:
    """Give them to the queue; on this machine wait for them. The exit code."""
    os.chdir(ROOT)
    try:
        executor = executor_of(queue, folder)
    except RuntimeError as error:
        print(f"submit_job: {error}", file=sys.stderr)
        return 1
    if queue.cluster == "slurm":
        submitted = executor.submit_array(jobs)
        for job in submitted:
            print(f"{job.job_id}: {job.paths.stdout}")
        return 0
    failed = 0
    for first in range(0, len(jobs), queue.parallel):
        running = [executor.submit(job) for job in jobs[first : first + queue.parallel]]
        for job in running:
            print(f"{job.job_id}: {job.paths.stdout}", flush=True)
        for job in running:
            if (trouble := job.exception()) is not None:
                failed += 1
                print(f"{job.job_id} failed: {' '.join(str(trouble).split())[-300:]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
