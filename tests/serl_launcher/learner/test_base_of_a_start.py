"""`checkpoint_path` starts from parameters of the same frozen base and units, or not at all."""

import pytest
from omegaconf import OmegaConf
from tiny import tiny_config, tiny_policy

from serl_launcher.learner.wiring import build_trainer
from serl_launcher.policies.base import trainable
from serl_launcher.run.files import DamagedFileError
from serl_launcher.run.parameters import base_sha256, publish, read_tensors
from serl_launcher.run.paths import RunPaths
from serl_launcher.run.versions import newest_whole


def published(folder, policy):
    tensors = {name: p.detach() for name, p in trainable(policy).items()}
    told = dict(version=3, step=0, base=base_sha256(policy), policy="t", now=0.0, keep=1)
    publish(folder / "params", tensors, **told)
    return folder


def start(tmp_path, source, **changes):
    cfg = tiny_config(checkpoint_path=str(source), telemetry__tensorboard=False, **changes)
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    OmegaConf.save(cfg, paths.config, resolve=True)
    return build_trainer(cfg, paths, None)


def test_parameters_trained_in_other_units_are_refused(tmp_path):
    policy = tiny_policy()
    policy.state_units.scale.mul_(57.3)  # degrees for radians
    with pytest.raises(ValueError, match=r"another frozen base or in other units: expected .*"):
        start(tmp_path, published(tmp_path / "theirs", policy))


def test_a_checkpoint_folder_names_its_base_too(tmp_path):
    trainer = start(tmp_path, published(tmp_path / "theirs", tiny_policy()))
    trainer.checkpoints.save()
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    _, metadata = read_tensors(folder / "tensors.safetensors")
    assert metadata == {"base_sha256": base_sha256(tiny_policy())}
    (tmp_path / "second").mkdir()
    with pytest.raises(ValueError, match="another frozen base or in other units"):
        start(tmp_path / "second", folder, task__spec__state_high=[2, 1, 2])


def test_a_version_that_a_kill_left_before_anybody_heard_of_it_does_not_stop_the_next_start(tmp_path):
    root = published(tmp_path / "run", tiny_policy())
    file, told, latest = (root / "params" / name for name in ("v000003.safetensors", "v000003.json", "latest.json"))
    cfg, paths = tiny_config(telemetry__tensorboard=False), RunPaths(root)
    OmegaConf.save(cfg, paths.config, resolve=True)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DamagedFileError, match=r"no version in .* is whole, and there is no checkpoint"):
        build_trainer(cfg, paths, None)
    told.unlink()
    latest.unlink()
    trainer = build_trainer(cfg, paths, None)
    trainer.publisher.publish()
    assert trainer.publisher.version == 4
    assert newest_whole(paths.params).version == 4
