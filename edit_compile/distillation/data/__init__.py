"""Data for distillation: deterministic streams addressed by position.

A source answers a `BatchRequest` for some rows of one global batch. The answer depends on the request alone, never on
earlier ones, and so do noise and timesteps, which the run draws by position (`seeding`). That makes three things trivial:

- resuming: the only state of the data is a number, the position;
- sharding: process r of n asks for its rows of the global batch, and all together see what one process would see;
- prefetching: requests may be answered ahead of time, in any thread.

A source with random access (`MapStyleSource`: files, shards with an index, a cache) is shuffled with a permutation seeded per
pass. One that can only be read in order (`IterableSource`) keeps its reader; asked for what is behind it, it opens the stream
again and skips. A sample that cannot be read is replaced with another that the position determines, and named in `skipped`.

To add a kind: a subclass of `DataConfig` with a literal `kind`, its options and `open`, decorated with `@register_data("kind")`,
or named in an entry point of the group `edit_compile.data`. Here, that is a module in `sources`.
"""

from edit_compile.distillation.data.registry import AnyData, DataConfig, data_kinds, open_source, register_data
from edit_compile.distillation.data.source import Batch, BatchRequest, DataSource, SourceContext, Split
from edit_compile.distillation.data.sources import cached, dataset, images, pipeline, prompts, random, shapes, webdataset  # noqa: F401 - they register themselves

__all__ = [
    "AnyData",
    "Batch",
    "BatchRequest",
    "DataConfig",
    "DataSource",
    "SourceContext",
    "Split",
    "data_kinds",
    "open_source",
    "register_data",
]
