"""Write small random files in the layouts of fairseq's HuBERT checkpoint and joblib's k-means.

Stubs of the classes of fairseq and omegaconf are in `sys.modules` only while a file is written. The names of weights
are those of fairseq's sources, and are independent of the table in the library.
"""

import argparse
import re
import sys
import typing
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)
NUM_LABELS = 500
FINAL_DIM = 8

# transformers' name -> fairseq's name
_NAMES = {
    r"feature_extractor\.conv_layers\.(\d+)\.conv\.(.+)": r"feature_extractor.conv_layers.\1.0.\2",
    r"feature_projection\.layer_norm\.(.+)": r"layer_norm.\1",
    r"feature_projection\.projection\.(.+)": r"post_extract_proj.\1",
    r"masked_spec_embed": r"mask_emb",
    r"encoder\.pos_conv_embed\.conv\.bias": r"encoder.pos_conv.0.bias",
    r"encoder\.pos_conv_embed\.conv\.(?:weight_g|parametrizations\.weight\.original0)": r"encoder.pos_conv.0.weight_g",
    r"encoder\.pos_conv_embed\.conv\.(?:weight_v|parametrizations\.weight\.original1)": r"encoder.pos_conv.0.weight_v",
    r"(encoder\.layers\.\d+)\.attention\.(.+)": r"\1.self_attn.\2",
    r"(encoder\.layers\.\d+)\.layer_norm\.(.+)": r"\1.self_attn_layer_norm.\2",
    r"(encoder\.layers\.\d+)\.feed_forward\.intermediate_dense\.(.+)": r"\1.fc1.\2",
    r"(encoder\.layers\.\d+)\.feed_forward\.output_dense\.(.+)": r"\1.fc2.\2",
    r"(encoder\.layers\.\d+\.final_layer_norm\..+)": r"\1",
    r"(encoder\.layer_norm\..+)": r"\1",
}


def tiny_hubert(seed: int = 0, *, num_layers: int = 10, large: bool = False, **changes: Any) -> nn.Module:
    """A HubertModel in eval mode with the published strides (400 samples of context, a frame every 320), width 16.

    Every parameter is random, norms and biases too, so that a misplaced weight changes the output. `large` selects the
    variant of the large checkpoints: layer norms in the extractor, convolutions with biases, norms before the blocks.
    """
    from transformers import HubertConfig, HubertModel

    settings: dict[str, Any] = dict(
        hidden_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        conv_kernel=CONV_KERNELS,
        conv_stride=CONV_STRIDES,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )
    if large:
        settings |= dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = HubertModel(HubertConfig(**(settings | changes)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            is_scale = "norm.weight" in name or name.endswith(("original0", "weight_g"))
            if is_scale:
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.ndim > 1:
                # Small outputs of blocks, since otherwise ten blocks make all frames of a wave alike.
                is_added = name.endswith(("out_proj.weight", "output_dense.weight", "v_proj.weight"))
                tensor.copy_(noise * ((0.6 if is_added else 1.5) / tensor[0].numel() ** 0.5))
            else:
                tensor.copy_(0.1 * noise)
    return model.eval().requires_grad_(False)


def hubert_state(model: nn.Module, seed: int = 1) -> "OrderedDict[str, Tensor]":
    """The weights of a HubertModel under fairseq's names, with the tensors that only pretraining needs."""
    generator = torch.Generator().manual_seed(seed)
    layered = model.config.feat_extract_norm == "layer"
    norms = r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(.+)"
    names = (
        *_NAMES.items(),
        (norms, r"feature_extractor.conv_layers.\1.2.1.\2" if layered else r"feature_extractor.conv_layers.\1.2.\2"),
    )
    weights = OrderedDict()
    weights["label_embs_concat"] = torch.rand(NUM_LABELS + 4, FINAL_DIM, generator=generator)
    for name, tensor in model.state_dict().items():
        fitting = [re.sub(pattern, theirs, name) for pattern, theirs in names if re.fullmatch(pattern, name)]
        if len(fitting) != 1:
            raise KeyError(f"{name} has {len(fitting)} names in fairseq")
        weights[fitting[0]] = tensor.detach().clone()
    weights["final_proj.weight"] = torch.randn(FINAL_DIM, model.config.hidden_size, generator=generator)
    weights["final_proj.bias"] = torch.randn(FINAL_DIM, generator=generator)
    return weights


def hubert_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The `cfg` that fairseq's trainer writes beside the weights, with the entries that a reader may use."""
    config = model.config
    layered = config.feat_extract_norm == "layer"
    convolutions = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    return {
        "_name": None,  # type: ignore[dict-item]
        "common": {"_name": None, "fp16": True, "seed": 1337, "user_dir": None},
        "task": {
            "_name": "hubert_pretraining",
            "data": "/checkpoint/librispeech",
            "labels": ["km"],
            "sample_rate": 16000,
            "normalize": layered,
            "max_sample_size": 250000,
        },
        "model": {
            "_name": "hubert",
            "label_rate": 50,
            "extractor_mode": "layer_norm" if layered else "default",
            "encoder_layers": config.num_hidden_layers,
            "encoder_embed_dim": config.hidden_size,
            "encoder_ffn_embed_dim": config.intermediate_size,
            "encoder_attention_heads": config.num_attention_heads,
            "activation_fn": "gelu",
            "dropout": 0.1,
            "encoder_layerdrop": 0.05,
            "final_dim": FINAL_DIM,
            "untie_final_proj": True,
            "layer_norm_first": config.do_stable_layer_norm,
            "conv_feature_layers": " + ".join(f"[{layer}]" for layer in convolutions),
            "conv_bias": config.conv_bias,
            "conv_pos": config.num_conv_pos_embeddings,
            "conv_pos_groups": config.num_conv_pos_embedding_groups,
            "mask_prob": 0.8,
            "feature_grad_mult": 0.1,
        },
        "criterion": {"_name": "hubert", "loss_weights": [10.0]},
    }


def write_hubert_checkpoint(
    path: str | Path,
    model: nn.Module,
    *,
    omegaconf: bool = False,
    args: bool = False,
    legacy: bool = False,
    weights: "dict[str, Tensor] | None" = None,
    settings: "dict[str, Any] | None" = None,
) -> Path:
    """Write a HubertModel in the layout of `hubert_base_ls960.pt`, with everything that fairseq's trainer adds.

    Args:
        path: The file.
        model: What to write.
        omegaconf: Settings as omegaconf containers instead of dictionaries.
        args: Settings as one flat argparse Namespace under `args`, as older fairseq wrote them.
        legacy: The file format of torch before 1.6 instead of a zip archive.
        weights: The `model` entry; None = `hubert_state(model)`.
        settings: The `cfg` entry; None = `hubert_settings(model)`.
    """
    settings = hubert_settings(model) if settings is None else settings
    weights = hubert_state(model) if weights is None else weights
    with fairseq_classes() as classes:
        cfg: Any = omegaconf_tree(settings, classes) if omegaconf else settings
        flat = {**settings["task"], **settings["model"], "arch": "hubert"}
        checkpoint = {
            "args": argparse.Namespace(**flat) if args else None,
            "cfg": None if args else cfg,
            "model": weights,
            "criterion": None,
            "optimizer_history": [
                {
                    "criterion_name": "HubertCriterion",
                    "optimizer_name": "FP16Optimizer",
                    "lr_scheduler_state": {"best": None},
                    "num_updates": 400000,
                }
            ],
            "task_state": {"dictionaries": [dictionary(classes)], "text_compressor": None},
            "extra_state": {
                "metrics": OrderedDict(default=[(0, "loss", "AverageMeter", {"val": 1.5, "round": 3})]),
                "best": np.float64(2.25),
                "random": np.arange(3),
                "train_iterator": {"epoch": 3, "shuffle": True, "version": 2},
            },
            "last_optimizer_state": {
                "state": {0: {"step": 400000, "exp_avg": torch.zeros(5, dtype=torch.half)}},
                "param_groups": [{"lr": 5e-4, "betas": (0.9, 0.98), "params": [0]}],
            },
        }
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return Path(path)


def write_kmeans(
    path: str | Path, centroids: "np.ndarray", compress: Any = 0, protocol: int | None = None, **changes: Any
) -> Any:
    """Write centroids [k, d] as joblib writes a fitted MiniBatchKMeans.

    Args:
        path: The file.
        centroids: `[k, d]` numpy.
        compress: As `joblib.dump` takes it: 0, a level, a method ("gzip") or both ("zlib", 3).
        protocol: Version of the pickle; None = joblib's choice.
        **changes: Further attributes that replace the estimator's own.

    Returns:
        The estimator, whose `predict` is the oracle of the ids.
    """
    import joblib
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(
        n_clusters=len(centroids), batch_size=64, n_init=1, random_state=0, max_no_improvement=None
    )
    repeated = np.concatenate([centroids, centroids + 0.01])
    kmeans.partial_fit(repeated)
    kmeans.cluster_centers_ = centroids
    for name, value in changes.items():
        setattr(kmeans, name, value)
    joblib.dump(kmeans, path, compress=compress, protocol=protocol)
    return kmeans


@contextmanager
def fairseq_classes() -> Iterator[dict[str, type]]:
    """Put stub modules of fairseq and omegaconf into `sys.modules` within the block."""
    places = {
        "fairseq.data.dictionary": ["Dictionary"],
        "fairseq.models.hubert.hubert": ["HubertConfig"],
        "fairseq.tasks.hubert_pretraining": ["HubertPretrainingConfig"],
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.nodes": ["AnyNode"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
    }
    modules: dict[str, ModuleType] = {}
    classes = {}
    for module_name, class_names in places.items():
        parts = module_name.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            modules.setdefault(name, ModuleType(name))
        for class_name in class_names:
            classes[class_name] = type(class_name, (), {"__module__": module_name})
            setattr(modules[module_name], class_name, classes[class_name])
    with mock.patch.dict(sys.modules, modules):
        yield classes


def dictionary(classes: dict[str, type]) -> Any:
    """A pickled `fairseq.data.dictionary.Dictionary`: the labels of pretraining."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, range(NUM_LABELS))]
    made = classes["Dictionary"]()
    made.__dict__.update(
        bos_word="<s>",
        unk_word="<unk>",
        symbols=symbols,
        count=[1] * len(symbols),
        indices={symbol: index for index, symbol in enumerate(symbols)},
        bos_index=0,
        nspecial=4,
    )
    return made


def omegaconf_tree(value: Any, classes: dict[str, type], parent: Any = None, key: Any = None) -> Any:
    """What omegaconf pickles for plain settings, namely containers and leaf nodes with metadata and parents."""
    kinds = {dict: ("DictConfig", "ContainerMetadata"), list: ("ListConfig", "ContainerMetadata")}
    node_name, metadata_name = kinds.get(type(value), ("AnyNode", "Metadata"))
    node, metadata = classes[node_name](), classes[metadata_name]()
    metadata.__dict__.update(ref_type=typing.Any, object_type=None, optional=True, key=key, flags={}, flags_root=False)
    if metadata_name == "ContainerMetadata":
        metadata.__dict__.update(
            object_type=type(value), key_type=typing.Any, element_type=typing.Any, resolver_cache={}
        )
        if key == "model":
            metadata.object_type = classes["HubertConfig"]
    node.__dict__.update(_metadata=metadata, _parent=parent)
    if isinstance(value, dict):
        node._content = {name: omegaconf_tree(item, classes, node, name) for name, item in value.items()}
    elif isinstance(value, list):
        node._content = [omegaconf_tree(item, classes, node, index) for index, item in enumerate(value)]
    else:
        node._val = value
    return node
