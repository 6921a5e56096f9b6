"""Image sizes for policies. Called by whoever prepares observations; uint8 in, uint8 out."""

import numpy as np
from PIL import Image


def resize_with_pad(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize without distortion, centred on black.

    Args:
        images: uint8[..., h, w, 3].
        height: wanted height, pixels.
        width: wanted width, pixels.

    Returns:
        uint8[..., height, width, 3]; `images` itself when the size fits already.
    """
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"expected images uint8[..., h, w, 3], got {images.dtype}{list(images.shape)}")
    if images.shape[-3:-1] == (height, width):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    resized = np.stack([_resize_one(image, height, width) for image in flat])
    return resized.reshape(*images.shape[:-3], height, width, 3)


def _resize_one(image: np.ndarray, height: int, width: int) -> np.ndarray:
    scale = min(height / image.shape[0], width / image.shape[1])
    h, w = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[top : top + h, left : left + w] = np.asarray(
        Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)
    )
    return canvas
