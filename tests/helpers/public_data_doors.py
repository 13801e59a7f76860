"""Valid arguments of exported trainers, of functions that read and write files, and of published models."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.data import AudioItem, CropDataset, load_items
from audiolm_pytorch.data.shards import write_shards
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.lm.task import StageObjective
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.semantic import BestRQ, BestRQEncoder, deduplicate
from audiolm_pytorch.training import LoopSettings
from musiclm_pytorch import MelodyEmbedder, MusicGen
from musiclm_pytorch.evaluation.metric import ClipSet
from musiclm_pytorch.evaluation.report import MetricValue
from tests.helpers import small_models as small
from tests.helpers.toy_training import ToyTask

__all__ = ["DATA_ROWS"]

HZ = small.SAMPLE_HZ
RUN = {"batch_size": 1, "num_train_steps": 1}
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "seed": 0, "weight_decay": 0.1, "ema_decay": 0.9}
HUB = {"offline": True}


@cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def _out(name: str = "out") -> str:
    """Path of a new file or folder."""
    return str(Path(tempfile.mkdtemp(dir=_root().name), name))


@cache
def _sounds() -> str:
    """Folder of four captioned sounds."""
    folder = Path(_out("sounds"))
    for number in range(4):
        wave = 0.3 * torch.sin(torch.arange(5600) * (0.1 + 0.05 * number))
        write_audio(folder / f"{number}.wav", wave, HZ)
        (folder / f"{number}.txt").write_text(f"tone {number}\n")
    return str(folder)


@cache
def _melodies() -> str:
    """Manifest of a melody of two notes."""
    folder = Path(_out("melodies"))
    write_audio(folder / "a.wav", 0.3 * torch.sin(torch.arange(5600) * 0.1), HZ)
    (folder / "train.jsonl").write_text('{"audio": "a.wav", "pitch_class": [[0, 0.3, "C"], [0.3, 0.6, "G"]]}\n' * 2)
    return str(folder)


def _items() -> list[AudioItem]:
    return load_items(_sounds()).items


def _crops(seconds: float = 0.25) -> CropDataset:
    return CropDataset(_items(), seconds=seconds, rates_hz=(HZ,))


def _record(number: int) -> dict[str, np.ndarray]:
    return {"ids": np.arange(3 + number)}


@cache
def _shards() -> str:
    folder = _out("shards")
    write_shards(folder, _record, num_records=3, fingerprint={"a": 1})
    return folder


@cache
def _codec_folder() -> str:
    folder = _out("codec")
    save_module(small.small_soundstream(), folder)
    return folder


@cache
def _encoder_folder() -> str:
    folder = _out("encoder")
    save_module(small.small_tokenizer().encoder, folder)
    return folder


def _best_rq() -> Any:
    return BestRQ(encoder=small.small_tokenizer().encoder, codebook_size=8, codebook_dim=4, num_directions=8)


def _wide_encoder() -> Any:
    """An encoder with enough mels for the default objective."""
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "num_mels": 16, "frames_per_token": 2}
    return BestRQEncoder(**sizes, sample_hz=HZ, n_fft=256, hop_length=40)


def _stage(name: str) -> Any:
    return small.small_stages(audio_text_condition=False)[f"{name}_transformer"]


@cache
def _published(kind: str) -> Any:
    """A folder with a tiny published model, or its files."""
    folder = Path(_out(kind))
    folder.mkdir()
    if kind == "roberta":
        from tests.helpers.published_texts import write_text_encoder

        return str(write_text_encoder(folder / "model", kind))
    if kind == "vq_wav2vec":
        from tests.helpers.published_vq_wav2vec import vq_settings, write_vq_wav2vec

        return str(write_vq_wav2vec(folder / "model.pt", vq_settings()))
    if kind == "hubert_base":
        from tests.helpers.published_files import tiny_hubert, write_hubert_checkpoint, write_kmeans

        model: Any = tiny_hubert()
        write_kmeans(folder / "kmeans.bin", np.random.default_rng(0).normal(size=(4, model.config.hidden_size)))
        return str(write_hubert_checkpoint(folder / "model.pt", model))
    from tests.helpers.published_files import tiny_hubert

    tiny_hubert().save_pretrained(folder)
    return str(folder)


def _loaded(kind: str) -> Any:
    """A tiny published model in memory."""
    from tests import test_precision

    module = getattr(test_precision, kind)()
    return LoadedModel(module.model, preprocessor=module.config.get("preprocessor", {}))


def _entropy_model() -> Any:
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
    return EntropyTransformer(**sizes, codebook_size=16, num_quantizers=3, num_groups=1, rate_hz=200)


def _musicgen() -> Any:
    return MusicGen(codec=small.small_soundstream(), dim=16, depth=1, heads=2, max_seconds=1.0)


def _hf_rows() -> Any:
    from datasets import Audio, Dataset

    sounds = [{"bytes": Path(_sounds(), "0.wav").read_bytes(), "path": "0.wav"}] * 3
    return Dataset.from_dict({"audio": sounds}).cast_column("audio", Audio())


def _trainer(**parts: Any) -> dict[str, Any]:
    return {"folder": _sounds(), **RUN, "results_folder": _out(), **SETTINGS, **parts}


DATA_ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    "StageObjective": lambda: {
        **{"level_drop_prob": 0.1, "history_noise": 0.1, "input_noise": 0.1, "level_weights": (1.0, 2.0)},
    },
    "expand": lambda: {"runs": deduplicate(torch.tensor([[1, 1, 2, 3]]))},
    "LoopSettings": lambda: {
        **{"num_train_steps": 2, "batch_size": 1, "learning_rate": 0.1, "warmup_steps": 1, "final_lr_fraction": 0.1},
        **{"weight_decay": 0.1, "betas": (0.9, 0.99), "grad_accum_every": 1, "max_grad_norm": 1.0, "ema_decay": 0.9},
        **{"precision": "fp32", "seed": 1, "checkpoint_every_seconds": 1.0, "checkpoint_every_steps": 1},
        **{"validate_every": 1, "log_every": 1, "allow_changed": ("seed",)},
    },
    "CodecLossWeights": lambda: {
        **{"mel": 1.0, "waveform": 0.1, "adversarial": 0.1, "feature_matching": 0.1, "commitment": 1.0}
    },
    "CodecTask": lambda: {
        **{"codec": small.small_soundstream(), "train": _crops(), "valid": _crops()},
        **{"adversarial_start_step": 1, "discriminator_lead_steps": 1, "unquantized_steps": 1},
    },
    "BestRQTask": lambda: {"model": _best_rq(), "train": _crops(), "valid": _crops(), "valid_batch_size": 2},
    "CropDataset": lambda: {
        **{"items": _items(), "seconds": 0.25, "rates_hz": (HZ,), "seed": 1, "cache_bytes": 1000, "channels": 1}
    },
    "collate_crops": lambda: {"crops": [_crops().get(0, number) for number in range(2)]},
    "items_digest": lambda: {"items": _items()},
    "load_items": lambda: {"source": _sounds(), "min_seconds": 0.1, "channels": 1, "sample_hz": HZ},
    "load_split": lambda: {
        **{"source": _sounds(), "valid_fraction": 0.5, "seed": 1, "min_seconds": 0.1, "channels": 1, "sample_hz": HZ}
    },
    "read_audio": lambda: {
        **{"path": f"{_sounds()}/0.wav", "sample_hz": 16000, "channels": 1, "start_seconds": 0.1},
        **{"duration_seconds": 0.1},
    },
    "write_audio": lambda: {"path": _out("a.wav"), "wave": torch.rand(1, 80) - 0.5, "sample_hz": HZ, "comment": "a"},
    "save_module": lambda: {"module": small.small_soundstream(), "folder": _out(), "extra": {"a": 1}},
    "load_module": lambda: {"folder": _codec_folder(), "device": "cpu"},
    "write_report": lambda: {
        **{"path": _out("a.json"), "metrics": [MetricValue.mean("a", [1.0, 2.0])], "settings": {"a": 1}, "table": "a"}
    },
    "write_shards": lambda: {
        **{"folder": _out(), "make_record": _record, "num_records": 2, "fingerprint": {"a": 1}},
        "records_per_chunk": 2,
    },
    "write_tars": lambda: {"dataset": _hf_rows(), "folder": _out(), "rows_per_tar": 2},
    "TokenShards": lambda: {"folder": _shards(), "expect_fingerprint": {"a": 1}, "max_open_chunks": 2},
    "TrainLoop": lambda: {
        "task": ToyTask(),
        "settings": LoopSettings(num_train_steps=1, batch_size=1),
        "folder": _out(),
    },
    "TextTokenizer": lambda: {"special_tokens": False},
    "GroupedQuantizer": lambda: {"quantizers": [small.small_soundstream().quantizer]},
    "extract": lambda: {"items": _items(), "extractors": [], "seconds": 0.5},
    "evaluate": lambda: {"metrics": [], "generated": [ClipSet("a", _items(), {})]},
    "KMeansTrainer": lambda: {
        **{"encoder": small.small_tokenizer().encoder, "layer": 1, "num_clusters": 4, "folder": _sounds()},
        **{"results_folder": _out(), "seconds": 0.25, "max_tokens": 50, "num_epochs": 1, "seed": 1},
    },
    "SemanticTokenizerTrainer": lambda: _trainer(encoder=_wide_encoder(), seconds=0.25),
    "SemanticTransformerTrainer": lambda: _trainer(
        **{"transformer": _stage("semantic"), "wav2vec": small.small_tokenizer(), "data_max_length_seconds": 0.25},
        **{"objective": StageObjective(history_noise=0.1, level_weights=(1.0,))},
    ),
    "CoarseTransformerTrainer": lambda: _trainer(
        **{"transformer": _stage("coarse"), "wav2vec": small.small_tokenizer(), "codec": small.small_soundstream()},
        **{"data_max_length": 2000, "objective": StageObjective(history_noise=0.1, input_noise=0.1)},
    ),
    "FineTransformerTrainer": lambda: _trainer(
        **{"transformer": _stage("fine"), "codec": small.small_soundstream(), "data_max_length_seconds": 0.25},
        **{"objective": StageObjective(input_noise=0.1, level_weights=(1.0, 1.0))},
    ),
    "SoundStreamTrainer": lambda: _trainer(
        **{"soundstream": small.small_soundstream(denoising=FiLM(dim=16)), "noise_folder": _sounds()},
        **{"data_max_length_seconds": 0.25, "noise_snr_db": (0.0, 5.0), "unquantized_steps": 1, "num_train_steps": 2},
    ),
    "EntropyCoder": lambda: {"model": _entropy_model()},
    "EntropyTransformerTrainer": lambda: _trainer(
        transformer=_entropy_model(), codec=small.small_soundstream(), data_max_length_seconds=0.25
    ),
    "MelodyTrainer": lambda: (
        _trainer(
            embedder=MelodyEmbedder(audio_transformer=small.small_mulan().audio, window_seconds=0.2, hop_seconds=0.1)
        )
        | {"folder": _melodies()}
    ),
    "MuLaNTrainer": lambda: (
        _trainer(mulan=small.small_mulan(), seconds=0.5, valid_fraction=0.5, chunk_size=2, cache_bytes=1000)
        | {"batch_size": 2}
    ),
    "open_encoder": lambda: {"source": _encoder_folder(), **HUB},
    "TransformersEncoder": lambda: {
        **{"source": _published("hubert"), "layer_count": 2, "window_seconds": 2.0, "context_seconds": 0.5, **HUB}
    },
    "TransformersTextEncoder": lambda: {"source": _published("roberta"), "frozen": True, "max_seq_len": 8, **HUB},
    "HubertWithKmeans": lambda: {
        **{"checkpoint_path": _published("hubert_base"), "target_sample_hz": 16000, "output_layer": 2, **HUB},
        **{"kmeans_path": str(Path(_published("hubert_base")).with_name("kmeans.bin")), "seq_len_multiple_of": 2},
    },
    "EncodecWrapper": lambda: {"source": _loaded("encodec"), "bandwidth_kbps": 20.0, "codes_only_rms": 0.1},
    "ClapMuLaN": lambda: {"source": _loaded("clap"), "tokenizer": TextTokenizer(), "window_stride_seconds": 1.0},
    "MusicGenTrainer": lambda: _trainer(
        musicgen=_musicgen(), data_max_length_seconds=0.25, lora_rank=2, lora_scale=1.0
    ),
    "FairseqVQWav2Vec": lambda: {
        "checkpoint_path": _published("vq_wav2vec"),
        "target_sample_hz": 16000,
        "seq_len_multiple_of": 2,
    },
}
