"""`musiclm train`: every stage of a preset in order, each continued where it stopped."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs import SoundStream, SpectralSoundStream
from audiolm_pytorch.codecs.training import SoundStreamTrainer
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import load_split
from audiolm_pytorch.data.shards import TokenShards, write_shards
from audiolm_pytorch.io import (
    fingerprint_of,
    load_module,
    read_json,
    read_weights,
    save_module,
    write_json,
    write_weights,
)
from audiolm_pytorch.semantic import BestRQEncoder, KMeansTokenizer
from audiolm_pytorch.semantic.training import SemanticTokenizerTrainer
from audiolm_pytorch.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.stages.trainers import (
    CoarseTransformerTrainer,
    FineTransformerTrainer,
    SemanticTransformerTrainer,
)
from audiolm_pytorch.training.randomness import preserved_generators, seed_generators
from musiclm_pytorch.bundle import save_parts
from musiclm_pytorch.config import Preset, RunConfig
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.mulan.tokenizer import TextTokenizer
from musiclm_pytorch.training import MuLaNTrainer, captions_of, fit_quantizer

__all__ = ["STAGES", "Pipeline", "StageReport"]

logger = logging.getLogger(__name__)

# Each with the stages whose result it needs.
STAGES: dict[str, tuple[str, ...]] = {
    "codec": (),
    "semantic-tokenizer": (),
    "mulan": (),
    "quantizer": ("mulan",),
    "semantic": ("semantic-tokenizer", "codec", "quantizer"),
    "coarse": ("semantic-tokenizer", "codec", "quantizer"),
    "fine": ("semantic-tokenizer", "codec", "quantizer"),
}
_LANGUAGE_MODELS = ("semantic", "coarse", "fine")


@dataclass(frozen=True)
class StageReport:
    """How a stage went: its name, wall time in seconds over all sessions, and a line of figures."""

    stage: str
    seconds: float
    summary: str


class Pipeline:
    """All stages of a run over one folder of audio, in one output folder.

    A finished stage leaves `OUT/<stage>/model`; tokens are computed once into `OUT/tokens`; the assembled model is
    `OUT/model`.

    Args:
        preset: Sizes and steps.
        data: Folder of audio or JSONL manifest.
        out: Folder of the run; made if missing. A folder belongs to one preset, seed and list of files.
        seed: Of weights, data order and noise.
        accelerator: Shared by all stages; one is made if not given.

    Raises:
        ValueError: If the data cannot be read or the folder holds another run.
    """

    @beartype
    def __init__(
        self,
        preset: Preset,
        *,
        data: str | Path,
        out: str | Path,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.preset, self.data, self.out, self.seed = preset, Path(data), Path(out), seed
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; name a folder with --out")
        self.train_items, self.valid_items = load_split(self.data, min_seconds=1.0)
        self._accelerator = accelerator

    # what there is

    @cached_property
    def accelerator(self) -> Accelerator:
        """The Accelerator that every stage shares."""
        return self._accelerator or Accelerator()

    @property
    def model_folder(self) -> Path:
        """Where the assembled model is."""
        return self.out / "model"

    @property
    def is_complete(self) -> bool:
        """Whether every stage is done and the model assembled."""
        return (self.model_folder / "musiclm.json").is_file()

    def is_done(self, stage: str) -> bool:
        """Whether a stage has left its result."""
        return (self._result(stage) / "config.json").is_file()

    def _result(self, stage: str) -> Path:
        return self.out / stage / "model"

    # running

    @beartype
    def run(self, stage: str = "all") -> Iterator[StageReport]:
        """Run one stage, or all that are not done, and report each as it ends.

        Raises:
            ValueError: If there is no such stage, or what it needs is missing.
        """
        if stage != "all" and stage not in STAGES:
            raise ValueError(f"there is no stage {stage!r}; choose all or one of: {', '.join(STAGES)}")
        self._claim_folder()
        for name in STAGES if stage == "all" else (stage,):
            missing = [needed for needed in STAGES[name] if not self.is_done(needed)]
            if missing:
                raise ValueError(
                    f"{name} needs {' and '.join(missing)} first: musiclm train {missing[0]} with this --out"
                )
            if self.is_done(name):
                yield StageReport(name, self._seconds(name), "done before")
                continue
            yield self._timed(name)
        if all(self.is_done(name) for name in STAGES) and not self.is_complete:
            self.assemble()

    def _timed(self, stage: str) -> StageReport:
        started = time.monotonic()
        runner: Callable[[], dict[str, Any]] = getattr(self, f"_run_{stage.replace('-', '_')}")
        with preserved_generators():
            # initial weights are a pure function of seed and stage, whichever stages ran before in this process
            seed_generators(self.seed, stage, device=self.accelerator.device)
            metrics = runner()
        seconds = time.monotonic() - started + self._seconds(stage)
        write_json(self.out / stage / "report.json", {"seconds": seconds, "metrics": metrics})
        figures = [f"{key} {value:.4g}" for key, value in metrics.items() if key.startswith("valid.")]
        return StageReport(stage, seconds, "  ".join(figures[:4]))

    def _seconds(self, stage: str) -> float:
        report = self.out / stage / "report.json"
        return float(read_json(report)["seconds"]) if report.is_file() else 0.0

    def _claim_folder(self) -> None:
        """Write down what this folder is a run of, or refuse a folder of another run."""
        paths = sorted(str(item.path) for item in [*self.train_items, *self.valid_items])
        mine = {
            "format_version": 1,
            "preset": asdict(self.preset),
            "seed": self.seed,
            "num_files": len(paths),
            "files": sha256("\n".join(paths).encode()).hexdigest()[:16],
        }
        file = self.out / "run.json"
        if not file.is_file():
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(file, mine)
            return
        theirs = read_json(file)
        mine = json.loads(json.dumps(mine))
        different = [key for key in mine if mine[key] != theirs.get(key)]
        if different:
            shown = "; ".join(f"{key}: {_short(theirs.get(key))} there, {_short(mine[key])} now" for key in different)
            raise ValueError(f"{self.out} holds another run ({shown}); use the same settings or another --out")

    def _loop(self, stage: str, run: RunConfig) -> dict[str, Any]:
        """Arguments that every trainer takes."""
        return dict(
            batch_size=run.batch_size,
            num_train_steps=run.num_train_steps,
            results_folder=self.out / stage,
            accelerator=self.accelerator,
            learning_rate=run.learning_rate,
            warmup_steps=run.warmup_steps,
            precision=run.precision,
            seed=self.seed,
            validate_every=max(1, run.num_train_steps // 8),
        )

    # tokenizers

    def build_codec(self) -> SoundStream:
        """An untrained codec of the preset."""
        c = self.preset.codec
        return SpectralSoundStream(
            dim=c.dim,
            encoder_depth=c.encoder_depth,
            decoder_depth=c.decoder_depth,
            target_sample_hz=c.sample_hz,
            hop_samples=c.hop_samples,
            codebook_size=c.codebook_size,
            rq_num_quantizers=c.num_quantizers,
            code_dim=c.code_dim,
        )

    def _run_codec(self) -> dict[str, Any]:
        run = self.preset.codec.run
        trainer = SoundStreamTrainer(
            self.build_codec(),
            items=(self.train_items, self.valid_items),
            data_max_length_seconds=run.seconds,
            **self._loop("codec", run),
        )
        result = trainer.train()
        self._keep("codec", trainer.task.codec)
        return result.metrics

    def build_semantic_encoder(self) -> BestRQEncoder:
        """An untrained semantic encoder of the preset."""
        s = self.preset.semantic_tokenizer
        return BestRQEncoder(dim=s.dim, depth=s.depth, heads=s.heads)

    def _run_semantic_tokenizer(self) -> dict[str, Any]:
        s = self.preset.semantic_tokenizer
        trainer = SemanticTokenizerTrainer(
            encoder=self.build_semantic_encoder(),
            items=(self.train_items, self.valid_items),
            seconds=s.run.seconds,
            **self._loop("semantic-tokenizer", s.run),
        )
        result = trainer.train()
        num_clusters = min(s.num_clusters, max(2, 10 * len(self.train_items)))
        fit = trainer.fit_tokenizer(layer=s.layer, num_clusters=num_clusters)
        self._keep("semantic-tokenizer", fit.tokenizer)
        return {**result.metrics, "valid.kmeans_explained": fit.usage.explained}

    def build_mulan(self) -> MuLaN:
        """An untrained MuLaN of the preset, its text tokenizer trained on the captions."""
        m = self.preset.mulan
        captions = [caption for item in self.train_items for caption in captions_of(item)]
        if not captions:
            raise ValueError(f"{self.data} has no captions; MuLaN needs a manifest with 'audio' and 'caption'")
        tokenizer = TextTokenizer.train(captions, vocab_size=m.text_vocab_size)
        sizes = dict(dim=m.dim, depth=m.depth, heads=m.heads)
        audio = AudioSpectrogramTransformer(**sizes, num_mels=m.num_mels, spec_n_fft=400, spec_hop_length=160)
        text = TextTransformer(
            **sizes, num_tokens=tokenizer.vocab_size, max_seq_len=m.text_max_tokens, tokenizer=tokenizer
        )
        return MuLaN(audio_transformer=audio, text_transformer=text)

    def _run_mulan(self) -> dict[str, Any]:
        run = self.preset.mulan.run
        trainer = MuLaNTrainer(
            mulan=self.build_mulan(),
            items=(self.train_items, self.valid_items),
            seconds=run.seconds,
            **self._loop("mulan", run),
        )
        result = trainer.train()
        self._keep("mulan", trainer.task.mulan)
        return result.metrics

    def _run_quantizer(self) -> dict[str, Any]:
        p = self.preset
        quantizer = MuLaNEmbedQuantizer(
            mulan=self._load("mulan", MuLaN),
            conditioning_dims=[getattr(p, name).dim for name in _LANGUAGE_MODELS],
            namespaces=_LANGUAGE_MODELS,
            rq_num_quantizers=p.quantizer.num_quantizers,
            codebook_size=min(p.quantizer.codebook_size, len(self.train_items)),
        )
        agreement = fit_quantizer(quantizer, self.train_items, seed=self.seed)
        self._keep("quantizer", quantizer)
        return {f"valid.agreement_level_{level}": value for level, value in enumerate(agreement, start=1)}

    def _keep(self, stage: str, module: nn.Module) -> None:
        """Save a stage's result as fp16, so that whatever is computed with it holds for the exported model too."""
        if self.accelerator.is_main_process:
            save_module(module.eval(), self._result(stage), dtype=torch.float16)
        self.accelerator.wait_for_everyone()

    def _load(self, stage: str, kind: type[nn.Module]) -> Any:
        return load_module(self._result(stage), expect=kind)

    # tokens

    def tokens(self, part: str = "train") -> TokenShards:
        """Semantic tokens, codes and MuLaN latents of every file of a part ("train" or "valid"), computed once."""
        items = self.train_items if part == "train" else self.valid_items
        codec: SoundStream = self._load("codec", SoundStream)
        tokenizer: KMeansTokenizer = self._load("semantic-tokenizer", KMeansTokenizer)
        mulan: MuLaN = self._load("mulan", MuLaN)
        rates_hz = (tokenizer.target_sample_hz, codec.target_sample_hz, mulan.sample_hz)
        fingerprint = {
            "codec": codec.fingerprint,
            "semantic_tokenizer": tokenizer.fingerprint,
            "mulan": fingerprint_of(mulan),
            "part": part,
        }
        dataset = CropDataset(items, None, rates_hz, seed=self.seed, cache_bytes=0)

        @torch.no_grad()
        def make_record(index: int) -> dict[str, np.ndarray]:
            waves = dataset.get(0, index).waves
            return {
                "semantic": tokenizer(waves[tokenizer.target_sample_hz][None])[0].numpy(),
                "acoustic": codec.tokenize(waves[codec.target_sample_hz][None])[0].numpy(),
                "latents": mulan.window_latents(waves[mulan.sample_hz]).half().numpy(),
                "duration_seconds": np.float32(items[index].num_samples / items[index].sample_hz),
            }

        folder = self.out / "tokens" / part
        write_shards(
            folder,
            make_record,
            len(items),
            fingerprint,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )
        self.accelerator.wait_for_everyone()
        return TokenShards(folder, fingerprint)

    # language models

    def _run_semantic(self) -> dict[str, Any]:
        return self._train_language_model("semantic", SemanticTransformerTrainer)

    def _run_coarse(self) -> dict[str, Any]:
        return self._train_language_model("coarse", CoarseTransformerTrainer)

    def _run_fine(self) -> dict[str, Any]:
        return self._train_language_model("fine", FineTransformerTrainer)

    def build_language_model(self, stage: str, num_semantic_tokens: int) -> nn.Module:
        """An untrained language model of the preset."""
        p, config = self.preset, getattr(self.preset, stage)
        frame_hz = p.codec.sample_hz // p.codec.hop_samples
        num_coarse = p.num_coarse_quantizers
        sizes = dict(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
            cond_drop_prob=config.cond_drop_prob,
            audio_text_condition=True,
        )
        if stage == "semantic":
            return SemanticTransformer(num_semantic_tokens=num_semantic_tokens, **sizes)
        if stage == "coarse":
            return CoarseTransformer(
                num_semantic_tokens=num_semantic_tokens,
                codebook_size=p.codec.codebook_size,
                num_coarse_quantizers=num_coarse,
                rate_hz=frame_hz,
                **sizes,
            )
        return FineTransformer(
            codebook_size=p.codec.codebook_size,
            num_coarse_quantizers=num_coarse,
            num_fine_quantizers=p.codec.num_quantizers - num_coarse,
            rate_hz=frame_hz,
            **sizes,
        )

    def _table_file(self, stage: str) -> Path:
        return self.out / stage / "conditioning_table.safetensors"

    def _train_language_model(self, stage: str, trainer_class: Callable[..., Any]) -> dict[str, Any]:
        run, config = getattr(self.preset, stage).run, getattr(self.preset, stage)
        tokenizer: KMeansTokenizer = self._load("semantic-tokenizer", KMeansTokenizer)
        transformer = self.build_language_model(stage, tokenizer.codebook_size)
        quantizer: MuLaNEmbedQuantizer = self._load("quantizer", MuLaNEmbedQuantizer)
        trainer = trainer_class(
            transformer=transformer,
            audio_conditioner=quantizer,
            shards=self.tokens("train"),
            valid_shards=self.tokens("valid"),
            data_max_length_seconds=run.seconds,
            level_drop_prob=config.level_drop_prob,
            **self._loop(stage, run),
        )
        result = trainer.train()
        # before the model folder, whose presence says that the stage is done
        write_weights(self._table_file(stage), {"weight": quantizer.table(stage).weight.detach()})
        self._keep(stage, transformer)
        return result.metrics

    # the whole

    def assemble(self) -> Path:
        """Write the model: every part, with the trained conditioning tables in the quantizer.

        Returns:
            The model's folder.
        """
        quantizer: MuLaNEmbedQuantizer = self._load("quantizer", MuLaNEmbedQuantizer)
        for stage in _LANGUAGE_MODELS:
            weights, _ = read_weights(self._table_file(stage))
            with torch.no_grad():
                quantizer.table(stage).weight.copy_(weights["weight"])
        parts = {
            "codec": self._load("codec", SoundStream),
            "semantic_tokenizer": self._load("semantic-tokenizer", KMeansTokenizer),
            "quantizer": quantizer,
            "semantic": self._load("semantic", SemanticTransformer),
            "coarse": self._load("coarse", CoarseTransformer),
            "fine": self._load("fine", FineTransformer),
        }
        save_parts(self.model_folder, parts, {"preset": self.preset.name, "seed": self.seed})
        return self.model_folder


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
