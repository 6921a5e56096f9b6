"""The columns of the exported LeRobotDataset v3: which exist, their dtypes and shapes.

Called by the dataset writer and by recovery; `TaskSpec` in, LeRobot feature dictionaries and an Arrow schema out.
LeRobot's own tools set the rules: every feature has `names`; a column whose name starts with `action` or `observation.`
is taken for a policy input or output, so everything else lives under `next.`, `complementary_info.` or `intervention`.
"""

import json
from typing import Any

import pyarrow as pa

from serl_transport.contract.schema import ACTION, IMAGE_PREFIX, MODES, STATE
from serl_transport.contract.specs import TaskSpec

POLICY_VERSION = "complementary_info.policy_version"
ORDINAL = "complementary_info.episode_ordinal"
MODE = "complementary_info.mode"
TIME_NS = "complementary_info.time_ns"
MODE_CODES = {mode: code for code, mode in enumerate(MODES)}  # demo 0, online 1, eval 2: text would not collate

SCALARS = {  # one value per tick: column -> dtype
    "next.reward": "float32",
    "next.done": "bool",
    "next.truncated": "bool",
    "next.success": "bool",
    "intervention": "bool",
    POLICY_VERSION: "int64",
    ORDINAL: "int64",
    MODE: "int64",
    TIME_NS: "int64",
}
INDEX = {  # LeRobot's own bookkeeping columns
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how HF datasets stores an embedded PNG


def image_keys(spec: TaskSpec) -> list[str]:
    """The image columns, in the spec's order of cameras."""
    return [IMAGE_PREFIX + camera for camera in spec.cameras]


def frame_rate(spec: TaskSpec) -> int:
    """Whole frames per second of the dataset; LeRobot wants an integer, so a slower loop than 1 Hz counts as 1."""
    return max(1, round(spec.control_hz))


def dataset_features(spec: TaskSpec, video: bool) -> dict[str, dict[str, Any]]:
    """The `features` entry of info.json; images are `video` (mp4 beside the rows) or `image` (PNG within them)."""
    features: dict[str, dict[str, Any]] = {}
    for camera, (height, width) in spec.cameras.items():
        feature = {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if video:
            feature |= {"dtype": "video", "info": video_info(height, width, frame_rate(spec))}
        features[IMAGE_PREFIX + camera] = feature
    for key, names in ((STATE, spec.state_names), (ACTION, spec.action_names)):
        features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    for key, dtype in (SCALARS | INDEX).items():
        features[key] = {"dtype": dtype, "shape": [1], "names": [key.rsplit(".", 1)[-1]]}
    return features


def arrow_schema(spec: TaskSpec, video: bool) -> pa.Schema:
    """Schema of the data files, carrying the metadata by which HF datasets knows images from structs."""
    columns = {
        key: _column(feature["dtype"], feature["shape"])
        for key, feature in dataset_features(spec, video).items()
        if feature["dtype"] != "video"
    }
    metadata = {"info": {"features": {key: description for key, (_, description) in columns.items()}}}
    fields = [pa.field(key, kind) for key, (kind, _) in columns.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps(metadata)})


def _column(dtype: str, shape: list[int]) -> tuple[pa.DataType, dict[str, Any]]:
    """Arrow type of a feature and what HF datasets calls it; it reads shape [1] as a scalar."""
    if dtype == "image":
        return IMAGE_TYPE, {"_type": "Image"}
    kind, value = pa.type_for_alias(dtype), {"dtype": dtype, "_type": "Value"}
    if shape == [1]:
        return kind, value
    return pa.list_(kind, shape[0]), {"feature": value, "length": shape[0], "_type": "List"}


def video_info(height: int, width: int, fps: int) -> dict[str, Any]:
    """The `info` entry of a video feature, as `exporter.video` encodes it."""
    return {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.is_depth_map": False,
        "video.fps": fps,
        "video.channels": 3,
        "has_audio": False,
    }
