"""Parameters that come in chunks: the same bytes, in the dtypes that are served, or none of them."""

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from serving_samples import body, put
from tiny import SPEC, tiny_config

from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.query import query_from_body
from serl_launcher.serving.upload import Upload

SHAPES = {"matrix": (37, 11), "scalar": (), "empty": (0, 4), "vector": (128,)}


def tensors_and_places(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    dtypes = dict.fromkeys(SHAPES, torch.float32) | {"matrix": torch.bfloat16}
    return tensors, {name: torch.zeros(x.shape, dtype=dtypes[name], device=device) for name, x in tensors.items()}


@pytest.mark.parametrize("chunk", [4, 31, 128, 10_000])
def test_every_tensor_arrives_whole_in_the_dtype_that_is_served(chunk):
    tensors, like = tensors_and_places()
    placed = Upload(torch.device("cpu"), chunk)(tensors, like)
    for name, p in like.items():
        assert torch.equal(placed[name], tensors[name].to(p.dtype))


def test_a_card_gets_them_on_a_stream_of_their_own_and_each_chunk_is_waited_for(monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    tensors, like = tensors_and_places()
    upload = Upload(torch.device("cuda"), 128)
    placed = upload(tensors, like)
    for name, p in like.items():
        assert torch.equal(placed[name], tensors[name].to(p.dtype))
    assert upload._stream.waits == 7 + 1 + 0 + 4
    assert fake.current is fake.default


@pytest.mark.gpu
def test_a_card_gets_the_same_while_it_computes():
    tensors, like = tensors_and_places("cuda")
    upload = Upload(torch.device("cuda"), 128)
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        busy @ busy
    placed = upload(tensors, like)
    for name, p in like.items():
        assert torch.equal(placed[name].cpu(), tensors[name].to(p.dtype))


@pytest.fixture
def engine(tmp_path):
    put(tmp_path, 0)
    engine = PolicyEngine(tiny_config(), tmp_path)
    engine._upload = Upload(engine.device, 1000)
    assert engine.refresh()
    return engine


def ask(engine):
    return engine.act([query_from_body(body(), SPEC)])[0]


def test_an_engine_serves_what_came_in_chunks(engine, tmp_path):
    put(tmp_path, 1, shift=0.1)
    plain = PolicyEngine(tiny_config(), tmp_path)
    assert engine.refresh()
    assert plain.refresh()
    np.testing.assert_array_equal(ask(engine), ask(plain))


def test_a_file_that_is_torn_while_it_is_read_is_refused_and_the_last_version_serves_on(engine, tmp_path):
    before, upload = ask(engine), engine._upload

    def tear(tensors, like):
        with (tmp_path / "v000001.safetensors").open("r+b") as file:
            file.truncate(2000)
        return upload(tensors, like)

    put(tmp_path, 1, shift=0.1)
    engine._upload = tear
    assert not engine.refresh()
    assert engine.version == 0
    assert "v000001.safetensors cannot be read" in engine.trouble
    np.testing.assert_array_equal(ask(engine), before)
