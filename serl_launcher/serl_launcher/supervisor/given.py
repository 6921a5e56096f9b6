"""`checkpoint_path` of a start against what its run folder holds. Called by run_folder.prepare; torch-free.

A folder that has parameters goes on with them: other ones that a start names would be passed over, and an evaluation
would be of the ones before.
"""

from pathlib import Path

from omegaconf import DictConfig

from serl_launcher.run import checkpoints
from serl_launcher.run.origin import evaluates
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.versions import PublishedVersion, newest_whole


def name_version(cfg: DictConfig) -> None:
    """A learner that trains nothing serves one version: of a folder of versions the newest, by its file's name.

    config.yaml then tells which, and the same folder some versions later counts as another one.
    """
    if not cfg.checkpoint_path or not evaluates(cfg):
        return
    given = Path(cfg.checkpoint_path)
    for folder in (given / "params", given):
        if folder.is_dir() and (newest := newest_whole(folder)) is not None:
            cfg.checkpoint_path = str((folder / newest.file).resolve())
            print(f"evaluates {cfg.checkpoint_path}", flush=True)
            return


def passed_over(paths: RunPaths, old: DictConfig, cfg: DictConfig) -> str | None:
    """Why `checkpoint_path` would not be looked at in this folder, for people; None where it would, or was before."""
    given, before = cfg.checkpoint_path, old.get("checkpoint_path")
    if not given or (before and Path(before).resolve() == Path(given).resolve()):
        return None
    if PublishedVersion.read(paths.params) is None and not checkpoints.folders(paths.checkpoints):
        return None
    own = f"parameters that began at {before}" if before else "parameters of its own"
    return (
        f"checkpoint_path={given}: {paths.root} has {own} and would go on with those. Take run=<new name>, or leave "
        "checkpoint_path out to go on with what is there"
    )
