"""Pictures, captions and shards for tests, made on the spot; and an encoder that needs no model."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image


def image(number, height=24, width=24):
    """Smooth, its mean colour a function of the number."""
    rows, columns = np.mgrid[:height, :width]
    colour = np.array([37 * number % 200, 91 * number % 200, 53 * number % 200])
    shade = (rows[..., None] / height + columns[..., None] / width) * 25
    return Image.fromarray((colour + shade).astype(np.uint8))


def png(number, height=24, width=24):
    content = io.BytesIO()
    image(number, height, width).save(content, "PNG")
    return content.getvalue()


def folder_of(path, sizes, captions=True):
    """A folder with a picture of each (height, width), captions beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for number, (height, width) in enumerate(sizes):
        (path / f"{number:03d}.png").write_bytes(png(number, height, width))
        if captions:
            (path / f"{number:03d}.txt").write_text(f"image {number}")
    return path


def tar_of(path, members):
    """A tar file of names and contents."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def as_json(**fields):
    return json.dumps(fields).encode()


class Letters:
    """An encoder: images at half their size, captions by their letters, a mask over them."""

    granularity = 4
    length = 16

    def check(self, caption):
        if len(caption) > self.length:
            raise ValueError(f"{caption!r} is too long")

    def encode_captions(self, captions):
        codes = torch.zeros(len(captions), self.length, 3)
        mask = torch.zeros(len(captions), self.length)
        for row, caption in enumerate(captions):
            codes[row, : len(caption)] = torch.tensor([[ord(c), 1, 2] for c in caption]).float() if caption else 0
            mask[row, : len(caption)] = 1
        return {"encoder_hidden_states": codes, "encoder_attention_mask": mask}

    def encode_images(self, images):
        return torch.nn.functional.avg_pool2d(images, 2)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents / 2 + 0.5, scale_factor=2)

    def other_conditions(self, shape, size):
        return {}
