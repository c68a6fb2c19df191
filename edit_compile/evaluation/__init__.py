"""Evaluation of a converted model by the images that it makes: CLIP score, FID, and the distance from its teacher's."""
