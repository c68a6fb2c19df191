"""Tiny random models of the classes that `support.py` tries, a file a group."""

from tiny_models import image_cross, image_joint, other, timm_models, transformers_models, unets, video
from tiny_models.base import CONFIGURATIONS, SIZES, Configuration, Size

__all__ = [
    "CONFIGURATIONS",
    "SIZES",
    "Configuration",
    "Size",
    "image_cross",
    "image_joint",
    "other",
    "timm_models",
    "transformers_models",
    "unets",
    "video",
]
