"""Values that cannot be used as meant: refused by name where they enter the learner's side, and where actions leave."""

import numpy as np
import pytest
import torch
from tiny import SPEC, tiny_config

from serl_launcher.serving.engine import PolicyEngine
from serl_launcher.serving.openpi_keys import infer_body
from serl_launcher.serving.query import query_from_body

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
STATE = np.float32([0.1, 0.2, 0.3])


def message(image=PICTURE, **changes):
    return {"images": {camera: image for camera in SPEC.cameras}, "state": STATE, **changes}


@pytest.mark.parametrize("image", [PICTURE, PICTURE / np.float32(255), PICTURE.astype(np.int64), PICTURE / 255.0])
def test_a_picture_in_any_of_the_forms_is_the_same(image):
    seen = infer_body(message(image), SPEC, {})["observation"]["images"]["front"]
    assert np.abs(seen.astype(int) - PICTURE).max() <= 1
    assert seen.dtype == np.uint8


@pytest.mark.parametrize(
    ("image", "came"),
    [
        (PICTURE.astype(np.float32), r"expected float in \[0, 1\] \(or uint8\), got float32 from 0 to 255"),
        (PICTURE / np.float32(127.5) - 1, "got float32 from -1 to 1"),
        (PICTURE * np.float32("nan"), "got float32 from nan to nan"),
        (PICTURE.astype(np.int16) - 9, r"expected whole numbers in \[0, 255\], got int16 from -9 to 246"),
        (PICTURE.astype(np.uint16) * 257, "got uint16 from 0 to 65535"),
        (PICTURE > 9, r"expected uint8 or float in \[0, 1\], got bool"),
    ],
)
def test_a_picture_of_another_range_is_refused_with_camera_and_range(image, came):
    with pytest.raises(ValueError, match=f"camera 'front': .*{came}"):
        infer_body(message(image), SPEC, {})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": np.float64([0, np.nan, 0])}, "state dim '.*': expected a finite number, got nan"),
        ({"state": np.float64([0, 0, 1e300])}, "state dim '.*': expected a number from -1e"),
        ({"state": np.array([True, False, True])}, "state: expected numbers, got bool"),
        ({"prompt": b"\xff\xfe"}, "prompt: expected UTF-8 text"),
        ({"prompt": ["lift"]}, "prompt: expected a text, got list"),
    ],
)
def test_states_and_prompts_of_an_openpi_client(changes, told):
    with pytest.raises(ValueError, match=told):
        infer_body(message(**changes), SPEC, {})


def test_an_empty_prompt_is_not_taken_for_none():
    body = infer_body(message(), SPEC, {})
    assert query_from_body(body, SPEC).prompt == SPEC.prompt
    with pytest.raises(ValueError, match="infer: prompt: expected a text of 1 to"):
        query_from_body({**body, "prompt": ""}, SPEC)


def test_actions_that_are_no_numbers_do_not_leave(tmp_path):
    engine = PolicyEngine(tiny_config(), tmp_path)
    query = query_from_body(infer_body(message(), SPEC, {}), SPEC)
    assert np.isfinite(engine.act([query])[0]).all()
    with torch.no_grad():
        engine.policy.core.action_out_proj.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        engine.act([query])
