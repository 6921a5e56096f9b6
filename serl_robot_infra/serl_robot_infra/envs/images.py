"""Pictures of a size that the task asks for. Called by the environments whose cameras are not ours."""

import numpy as np
from PIL import Image


def fitted(image: np.ndarray, size: tuple[int, int], camera: str = "") -> np.ndarray:
    """uint8[h, w, 3] of `size` (h, w), averaged where the camera's is larger. ValueError for another dtype: whether a
    float's white is 1 or 255 is not known here."""
    if image.dtype != np.uint8:
        low, high = (image.min(), image.max()) if image.size else (0, 0)
        raise ValueError(f"camera {camera!r}: expected a picture of uint8, got {image.dtype} from {low:g} to {high:g}")
    if image.shape[:2] == size:
        return np.ascontiguousarray(image)
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BOX))


def shape_refusal(camera: str, taken: tuple[int, ...], size: tuple[int, int]) -> str | None:
    """Why the camera's uint8[h, w, 3] cannot be shown at `size`, in one line; None when it can."""
    if len(taken) == 3 and taken[2] == 3 and taken[0] >= size[0] and taken[0] * size[1] == taken[1] * size[0]:
        return None
    return (
        f"task.spec.cameras.{camera}: expected {list(taken[:2])} as the camera takes it or a smaller size of the same "
        f"shape, got {list(size)}"
    )
