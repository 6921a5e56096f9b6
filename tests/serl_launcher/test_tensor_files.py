"""Files written tensor by tensor: the library reads them, and nothing but the tensor in hand is in memory."""

import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from serl_launcher.run.parameters import StoredTensors, save_tensors
from serl_launcher.tensor_files import Pending, is_finite, write_tensors

TENSORS = {
    "half": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
    "count": torch.tensor([7], dtype=torch.int64),
}


def test_the_library_reads_what_was_written(tmp_path):
    save_tensors(TENSORS, tmp_path / "t.safetensors", {"version": "3"})
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"version": "3"}


def test_one_tensor_is_let_go_before_the_next_is_made(tmp_path):
    made: list[weakref.ref] = []

    def make(value):
        assert all(earlier() is None for earlier in made)
        tensor = torch.full((4,), value)
        made.append(weakref.ref(tensor))
        return tensor

    pending = {f"t{k}": Pending(torch.float32, (4,), lambda k=k: make(float(k))) for k in range(3)}
    write_tensors(tmp_path / "t.safetensors", pending)
    assert [load_file(tmp_path / "t.safetensors")[f"t{k}"][0].item() for k in range(3)] == [0, 1, 2]
    assert len(made) == 3


def test_a_tensor_that_is_not_as_announced_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"w: expected torch.float32 \(2,\), got torch.float32 \(3,\)"):
        write_tensors(tmp_path / "t.safetensors", {"w": Pending(torch.float32, (2,), lambda: torch.zeros(3))})


def test_stored_tensors_are_read_one_by_one_even_when_the_file_is_deleted(tmp_path):
    save_tensors(TENSORS, tmp_path / "t.safetensors")
    stored = StoredTensors(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").unlink()
    assert set(stored) == set(TENSORS)
    assert "absent" not in stored
    assert torch.equal(stored["half"], TENSORS["half"])
    stored["half"].zero_()  # of nobody else
    assert torch.equal(stored["half"], TENSORS["half"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found(dtype, value):
    tensor = torch.ones(3, 1000, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 500] = value
    assert not is_finite(tensor)


def test_whole_numbers_and_nothing_are_finite():
    assert is_finite(torch.ones(3, dtype=torch.int64))
    assert is_finite(torch.zeros(0))
