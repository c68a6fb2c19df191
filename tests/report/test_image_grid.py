"""Videos are laid out as strips of frames, and move in a GIF."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import edit_compile as ec
from edit_compile.demo import motion
from edit_compile.report.compare_samples import Samples, sample
from edit_compile.report.image_grid import image_grid

CAPTION = "a red circle moves left quickly on a white background"


def video(frames: int, side: int = 16) -> np.ndarray:
    """Make frames that grow brighter."""
    return np.linspace(0, 1, frames)[:, None, None, None] * np.ones((1, side, side, 3))


def test_a_strip_has_every_frame_in_order():
    sheet = np.asarray(image_grid(["a"], [("teacher", [video(4)])]))
    left, top, side, gap = 266, 46, 64, 2
    shown = [sheet[top : top + side, left + n * (side + gap) :][:, :side] for n in range(4)]
    assert [int(frame.mean()) for frame in shown] == [0, 85, 170, 255]
    assert all(frame.min() == frame.max() for frame in shown)


def test_long_videos_are_shown_by_eight_frames():
    few, many = (image_grid(["a"], [("teacher", [video(frames)])]).width for frames in (8, 81))
    assert few == many


def test_videos_move_in_a_gif_and_lie_side_by_side_elsewhere(tmp_path):
    samples = Samples(("a",), (video(5),), (video(5)[::-1],))
    samples.save(tmp_path / "clip.gif")
    samples.save(tmp_path / "strip.png")
    with Image.open(tmp_path / "clip.gif") as clip, Image.open(tmp_path / "strip.png") as strip:
        assert clip.n_frames == 5
        assert strip.width > 2 * 5 * 64
    Samples(("a",), (video(1)[0],), ()).save(tmp_path / "image.gif")
    assert (np.asarray(Image.open(io.BytesIO(samples._repr_png_()))) == np.asarray(samples.image())).all()
    with Image.open(tmp_path / "image.gif") as image:
        assert getattr(image, "n_frames", 1) == 1


def test_the_demo_video_model_is_sampled_by_name():
    samples = sample("demo/video-dit", CAPTION, steps=2)
    assert samples.student == ()
    assert samples.teacher[0].shape == (motion.FRAMES, motion.SIDE, motion.SIDE, 3)
    with pytest.raises(ec.ConfigError, match="30 x 24 px: demo/video-dit makes samples whose sides are multiples of 4"):
        sample("demo/video-dit", CAPTION, height=30)
    with pytest.raises(ec.ConfigError, match=r"does not know \['lighthouse'\]"):
        sample("demo/video-dit", "a lighthouse")


def test_a_long_caption_ends_with_its_row():
    black = np.zeros((160, 160, 3))
    one, other = (np.asarray(image_grid([caption, ""], [("teacher", [black, black])])) for caption in ("word " * 200, "word " * 400))
    assert (one[46:206, :266] < 200).any()
    assert (one[214:, :266] == 255).all()
    assert (one == other).all()
