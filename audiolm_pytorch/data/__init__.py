"""Training data: manifests of audio files, crops at several sample rates, batches, token shards."""

from audiolm_pytorch.data.batches import BatchPlan, CropBatch, collate_crops
from audiolm_pytorch.data.crops import Crop, CropDataset
from audiolm_pytorch.data.manifest import AudioItem, ItemReport, Rejected, load_items, load_split, split_items
from audiolm_pytorch.data.shards import TokenShards, write_shards

__all__ = [
    "AudioItem",
    "BatchPlan",
    "Crop",
    "CropBatch",
    "CropDataset",
    "ItemReport",
    "Rejected",
    "TokenShards",
    "collate_crops",
    "load_items",
    "load_split",
    "split_items",
    "write_shards",
]
