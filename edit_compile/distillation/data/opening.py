"""From a recipe's section to a source."""

from __future__ import annotations

from edit_compile.adapters.encoders import DemoEncoder, PipelineEncoder, make_decoder, make_encoder
from edit_compile.adapters.sampling import make_sampler
from edit_compile.distillation.data.captioned import Captioned, CaptionedData
from edit_compile.distillation.data.iterable_style import Streamed
from edit_compile.distillation.data.map_style import Indexed
from edit_compile.distillation.data.source import Origin, Source
from edit_compile.distillation.data.sources.cached import Cached, CachedData
from edit_compile.distillation.data.sources.hub import DatasetData, Stream
from edit_compile.distillation.data.sources.images import ImagesData
from edit_compile.distillation.data.sources.prompts import Prompts, PromptsData
from edit_compile.distillation.data.sources.tar_shards import TarData

_STREAM_HELD_OUT = 256
PictureData = ImagesData | DatasetData | TarData


def open_pictures(data: PictureData, origin: Origin) -> Source:
    """Captioned pictures, encoded as they are needed."""
    encoder = encoder_of(data, origin)
    if isinstance(data, DatasetData) and data.streaming:
        stream = Stream(data, origin.seed, data.held_out or _STREAM_HELD_OUT)
        return Streamed(stream, encoder, data.buckets, origin.seed, data.caption_dropout)
    skipped: dict[str, str] = {}
    items = Captioned(data.corpus(skipped), encoder, data.buckets)
    return Indexed(items, origin.seed, data.held_out, data.caption_dropout, skipped=skipped)


def open_prompts(data: PromptsData, origin: Origin) -> Source:
    """The teacher's own samples, drawn as they are needed; with the model at work, not beside it."""
    return Indexed(prompts_of(data, origin), origin.seed, data.held_out, data.caption_dropout, concurrent=False)


def open_cache(data: CachedData, origin: Origin) -> Source:
    """What `edit-compile cache` has computed."""
    items = Cached(data.path, origin.model, make_decoder(origin.base, origin.device, origin.dtype))
    return Indexed(items, origin.seed, data.held_out, data.caption_dropout, skipped=dict(items.index.skipped))


def prompts_of(data: PromptsData, origin: Origin) -> Prompts:
    """The prompts with what draws for them."""
    draw = make_sampler(origin.model, origin.base, origin.device, origin.dtype, data.options())
    return Prompts(data, origin.model, encoder_of(data, origin), draw, origin.seed)


def encoder_of(data: CaptionedData | PromptsData, origin: Origin) -> DemoEncoder | PipelineEncoder:
    return make_encoder(origin.model, origin.base, origin.device, origin.dtype, data.text_tokens)
