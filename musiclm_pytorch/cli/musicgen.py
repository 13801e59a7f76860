"""`musiclm train musicgen`: train or fine-tune a MusicGen on captioned audio."""

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import check_at_least, check_data, option_name
from musiclm_pytorch.cli.settings import PresetOptions, print_settings

if TYPE_CHECKING:
    from musiclm_pytorch.musicgen.musicgen import MusicGen
    from musiclm_pytorch.pipeline.musicgen_presets import MusicGenPreset

__all__ = ["TrainMusicGen"]

_NEW = ("codec", "text_encoder", "mulan")


@dataclass(frozen=True, kw_only=True)
class TrainMusicGen(PresetOptions):
    """Train a MusicGen on captioned audio, or fine-tune one.

    To continue an interrupted training, run the same command again. The presets are tiny (one or two CPU cores), and as
    published: small, medium, large, melody, audiogen. Every setting of a preset is an option, for example
    `--run.batch-size 6` or `--mix-prob 0.5`; `--print-config` lists them.
    """

    from_model: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Fine-tune this MusicGen, a folder or a hub id such as facebook/musicgen-small, with the settings of --preset."""
    lora_rank: int | None = None
    """With --from: train low-rank updates of this rank instead of all weights."""
    freeze: tuple[str, ...] = ()
    """With --from: names of parameters that are not trained, or parts of names, such as embedding or blocks.0."""
    stereo: bool = False
    """Train a stereo model. A mono model of --from is its start."""
    codec: str | None = None
    """Codec of a new model instead of that of the preset: codec_16khz (bundled), a folder, or a hub id."""
    text_encoder: str | None = None
    """Text encoder of a new model instead of that of the preset: a folder or a hub id such as t5-base."""
    mulan: str | None = None
    """Use the text tower of this MuLaN as the text encoder of a new model: tiny (bundled), a folder, or a hub id."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""
    allow_changed: tuple[str, ...] = ()
    """Names of settings that may differ from those of the interrupted run, such as batch_size or num_train_steps."""
    dry_run: bool = False
    """Print parameters, tokens, memory, disk space and estimated time. Nothing is written."""
    dry_run_device: str | None = None
    """Like --dry-run, with the estimated time on this GPU, such as a100, instead of a measurement on this machine."""

    @staticmethod
    def presets() -> dict[str, Any]:
        """Return the presets by name."""
        from musiclm_pytorch.pipeline.musicgen_presets import MUSICGEN_PRESETS

        return MUSICGEN_PRESETS

    def execute(self) -> int:
        """Train the model, and print its last validation metrics."""
        check_at_least(self, seed=0, lora_rank=1, num_workers=0)
        if self.from_model is None and (self.lora_rank is not None or self.freeze):
            option = "--freeze" if self.lora_rank is None else "--lora-rank"
            raise ValueError(f"{option} needs --from; add the model to fine-tune, or leave out {option}")
        from musiclm_pytorch.pipeline.musicgen_presets import musicgen_preset

        preset = self.resolved(musicgen_preset(self.preset or "tiny"))
        if self.print_config:
            print_settings(preset)
            return 0
        data, out = self.folders()
        check_data(data)

        from audiolm_pytorch.data.manifest import training_items
        from audiolm_pytorch.training.distributed import create_accelerator
        from musiclm_pytorch.pipeline.musicgen import musicgen_trainer

        accelerator = create_accelerator(self.track, out / "trackers", self.timeout_seconds)
        parts = self._parts(preset)
        channels = 2 if self.stereo else parts["codec"].channels
        items = training_items(data, None, min_seconds=1.0, channels=channels)
        # the estimate for a GPU needs no deep model
        sizes = preset if self.dry_run_device is None else replace(preset, depth=1)
        model = self._model(sizes, parts, items[0])
        if self.dry_run or self.dry_run_device is not None:
            from musiclm_pytorch.pipeline.estimate_musicgen import estimate_musicgen

            model.to(accelerator.device)
            table = estimate_musicgen(
                preset,
                model,
                items,
                lora_rank=self.lora_rank,
                freeze=self.freeze,
                assumed=self.dry_run_device,
                depth=preset.depth if self.from_model is None else None,
                num_processes=accelerator.num_processes,
            )
            print(table)
            return 0
        trainer = musicgen_trainer(
            preset,
            model,
            items,
            out=out,
            lora_rank=self.lora_rank,
            freeze=self.freeze,
            seed=self.seed,
            accelerator=accelerator,
            allow_changed=self.allow_changed,
            num_workers=self.num_workers,
        )
        result = trainer.train()
        trainer.loop.on_main_process(lambda: self._write_samples(out, trainer.musicgen, items[1]))
        if accelerator.is_main_process:
            valid = [f"{name} {value:.4g}" for name, value in result.metrics.items() if name.startswith("valid.")]
            print(f"{result.step} steps  {'  '.join(valid[:2])}".rstrip())
            print(printable(f'try: musiclm generate "a slow waltz" --model {out}'))
        return 0

    def _write_samples(self, out: Path, model: "MusicGen", items: Any) -> None:
        """Write music for the first captions of held-out files to `OUT/samples`."""
        if model.text_conditioner is not None:
            from musiclm_pytorch.pipeline.samples import MAX_SAMPLE_SECONDS, write_samples

            seconds = min(model.transformer.max_seconds or inf, MAX_SAMPLE_SECONDS)
            generate = partial(model, seconds=seconds, seed=self.seed)
            write_samples(out / "samples", items, generate, model.sample_hz)

    def _parts(self, preset: "MusicGenPreset") -> dict[str, Any]:
        """Load the codec and the text encoder of a new model, or the model to fine-tune and its codec."""
        if self.from_model is not None:
            if names := [name for name in _NEW if getattr(self, name) is not None]:
                raise ValueError(f"{option_name(names[0])} is for a new model; leave it out, or leave out --from")
            from musiclm_pytorch.musicgen.musicgen import MusicGen

            model = MusicGen.from_pretrained(**self.source_of(self.from_model))
            return {"model": model, "codec": model.codec}
        from audiolm_pytorch.codecs.base import Codec

        parts: dict[str, Any] = {"codec": Codec.from_pretrained(**self.source_of(self.codec or preset.codec))}
        if self.mulan is not None:
            from musiclm_pytorch.mulan import JointEmbedding, TextTransformer
            from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder

            tower = getattr(JointEmbedding.from_pretrained(**self.source_of(self.mulan)), "text_transformer", None)
            if not isinstance(tower, TextTransformer):
                raise ValueError(f"--mulan {self.mulan} has no TextTransformer; pass another one, or --text-encoder")
            parts["text_conditioner"] = TextTowerEncoder(tower, frozen=True)
        elif self.text_encoder or preset.text_encoder:
            from audiolm_pytorch.conditioning.published_text import TextConditioner

            source = self.source_of(str(self.text_encoder or preset.text_encoder))
            parts["text_conditioner"] = TextConditioner(**source)
        return parts

    def _model(self, preset: "MusicGenPreset", parts: dict[str, Any], items: Any) -> "MusicGen":
        """Return the model to train."""
        from audiolm_pytorch.data.manifest import captions_of
        from musiclm_pytorch.musicgen.stereo import stereo_from_mono
        from musiclm_pytorch.pipeline.musicgen import build_musicgen

        model: MusicGen | None = parts.get("model")
        if model is None:
            captions = [text for item in items for text in captions_of(item)]
            return build_musicgen(preset, **parts, captions=captions, stereo=self.stereo, seed=self.seed)
        return stereo_from_mono(model) if self.stereo and model.codec.channels == 1 else model
