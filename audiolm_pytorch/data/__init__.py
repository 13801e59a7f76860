"""Training data: audio files, archives and data sets, crops at several sample rates, batches, token shards."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch.data.batches import (
        BatchPlan as BatchPlan,
        CropBatch as CropBatch,
        collate_crops as collate_crops,
    )
    from audiolm_pytorch.data.crops import Crop as Crop, CropDataset as CropDataset
    from audiolm_pytorch.data.hf_dataset import write_tars as write_tars
    from audiolm_pytorch.data.items import (
        AudioItem as AudioItem,
        ItemReport as ItemReport,
        Rejected as Rejected,
        items_digest as items_digest,
    )
    from audiolm_pytorch.data.manifest import (
        load_items as load_items,
        load_split as load_split,
        split_items as split_items,
    )
    from audiolm_pytorch.data.shards import TokenShards as TokenShards, write_shards as write_shards

globals().update(lazy_exports(__name__))
