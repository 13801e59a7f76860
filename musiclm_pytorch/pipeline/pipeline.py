"""The training pipeline, which runs all steps of a preset in order and continues interrupted steps."""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.data.manifest import captions_of, training_items
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.generation.stage_samples import StageSampler
from audiolm_pytorch.lm.trainers import TABLE_FILE
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.files import read_weights, write_json
from audiolm_pytorch.saving.model_folder import exact_dtype
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.saving.ownership import check_folder_owner
from audiolm_pytorch.saving.sharing import card_text, write_card
from audiolm_pytorch.saving.text import logger_named
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.rng import seed_rng
from audiolm_pytorch.training.run_folder import RUN_KIND, read_record
from musiclm_pytorch.melody.embedder import CONDITION as MELODY, MelodyEmbedder
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import aspects_of
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline import run_folder
from musiclm_pytorch.pipeline.builders import STAGES, build_quantizer, build_stage
from musiclm_pytorch.pipeline.fine_tuning import FineTuning, warn_of_unread_captions
from musiclm_pytorch.pipeline.presets import Preset
from musiclm_pytorch.pipeline.pretrained_parts import check_pretrained
from musiclm_pytorch.pipeline.samples import MAX_SAMPLE_SECONDS, write_samples
from musiclm_pytorch.pipeline.steps import ALL_STEPS, MELODY_STEPS, STEPS, StepReport, check_step
from musiclm_pytorch.pipeline.token_shards import MIN_SECONDS, compute_melodies, compute_token_split
from musiclm_pytorch.pipeline.trainers import (
    codec_trainer,
    melody_trainer,
    mulan_trainer,
    semantic_tokenizer_trainer,
    stage_trainer,
)
from musiclm_pytorch.pretrained.parts import CARD, PARTS, save_parts
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.quantizer.fit import fit_quantizer

if TYPE_CHECKING:
    import accelerate

__all__ = ["Pipeline"]

logger = logger_named(__name__)

# Folders of a step that are removed when its result is complete, beside the saved module of its trainer.
_TRAINING_FILES = ("checkpoint", "checkpoint.previous", "discriminators", "features", "kmeans", "tokenizer")


class Pipeline:
    """Training pipeline, which runs all steps for one folder of audio and writes the results to one output folder.

    Only the methods `run` and `assemble` write files. Each step writes its result to `OUT/<step>/model`, but the step
    `tokens` writes to `tokens_folder`. The method `assemble` writes the whole model to `OUT/model`. When the result of
    a step is complete, its checkpoints are removed, so that weights are not stored several times. `OUT/samples`
    contains music of the whole model.

    Args:
        data: Folder of audio files, or a folder or file with a JSONL manifest.
        out: Output folder, which belongs to one preset, seed, list of files and set of pretrained modules.
        pretrained: Modules that replace the steps "codec", "semantic-tokenizer" or "mulan", by the name of the step.
        start: Model that is trained further, instead of a new one. The sizes of the preset are not used for its parts.
        allow_changed: Names of settings in `run.json` or of trainers that may differ from those of an interrupted run.
            Unfinished steps continue with the new settings; finished steps are not repeated.
        num_workers: Worker processes that load batches, see `LoopSettings`. The results do not depend on it.
        tokens_folder: Folder of the tokens, which several runs may share; None = `OUT/tokens`.
    """

    @typed
    def __init__(
        self,
        preset: Preset,
        *,
        data: str | Path,
        out: str | Path,
        seed: int = 0,
        accelerator: "accelerate.Accelerator | None" = None,
        pretrained: Mapping[str, nn.Module] | None = None,
        start: FineTuning | None = None,
        allow_changed: Sequence[str] = (),
        num_workers: int = 0,
        tokens_folder: str | Path | None = None,
    ) -> None:
        self.preset, self.data, self.out, self.seed = preset, Path(data), Path(out), seed
        self.tokens_folder = self.out / "tokens" if tokens_folder is None else Path(tokens_folder)
        for name, value in (("seed", seed), ("num_workers", num_workers)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        check_folder_owner(self.out, run_folder.RUN_MARKS, RUN_KIND)
        self.start = start or FineTuning()
        if pretrained and self.start.unchanged:
            raise ValueError("got pretrained parts and a MusicLM to train further; pass only one of them")
        self.pretrained = dict(self.start.unchanged or pretrained or {})
        if not self.start.unchanged:
            check_pretrained(preset, self.pretrained)
        channels = getattr(self.pretrained.get("codec", self.start.trained.get("codec")), "channels", 1)
        self.items = training_items(self.data, None, min_seconds=MIN_SECONDS, channels=channels)
        self.train_items, self.valid_items = self.items
        self._accelerator = accelerator
        self.allow_changed, self.num_workers = tuple(allow_changed), num_workers

    @cached_property
    def accelerator(self) -> "accelerate.Accelerator":
        """Accelerator of all training steps, created at the first use."""
        return self._accelerator or create_accelerator()

    @property
    def model_folder(self) -> Path:
        """Folder of the model that `assemble` writes."""
        return self.out / "model"

    @property
    def is_complete(self) -> bool:
        """Whether the folder of the assembled model is complete."""
        return (self.model_folder / CARD).is_file()

    @property
    def captions(self) -> list[str]:
        """All captions and aspects of the training files."""
        return [text for item in self.train_items for text in (*captions_of(item), *aspects_of(item))]

    def require_captions(self, step: str = "mulan") -> None:
        """Raise a ValueError if the training files have no captions, which `step` needs."""
        if not self.captions:
            raise ValueError(
                f"{self.data} has no captions, but the step {step} needs them; write a.txt beside a.wav, or pass a "
                "train.jsonl with 'audio' and 'caption' in every line"
            )

    @typed
    def is_done(self, step: str) -> bool:
        """Whether the result of a step exists."""
        return all(file.is_file() for file in self._files(step))

    def _files(self, step: str) -> list[Path]:
        """List the files whose contents identify the result of a step."""
        if step == "tokens":
            return [self.tokens_folder / part / "index.json" for part in ("train", "valid")]
        return [self.out / step / "model" / file for file in ("config.json", "model.safetensors")]

    @typed
    def run(self, step: str = "all", announce: Callable[[str], None] | None = None) -> Iterator[StepReport]:
        """Run one step, or all steps but those in `MELODY_STEPS`, and yield a report of each step.

        Finished steps are not run again. Missing tokens and pretrained modules that a step needs are written first.
        `announce` receives the name of each step that starts.
        """
        check_step(step)
        names = self._steps_to_run(step)
        self._check_needs(names)
        with run_folder.claimed_run(self.out, run_folder.facts_of(self), self.accelerator, self.allow_changed):
            for name in names:
                # tokens without a report are checked, because `musiclm tokenize` may have computed them for other data
                if self.is_done(name) and (name != "tokens" or self._report(name)):
                    self._check_fresh(name)
                    yield StepReport(name, float(self._report(name).get("seconds", 0.0)), "done before")
                    continue
                if announce is not None:
                    announce(name)
                yield self._run_step(name)
            if self._has_all_parts() and not self._is_up_to_date():
                for name in [name for name in self._steps_of_model() if name in MELODY_STEPS]:
                    self._check_fresh(name)
                self.assemble()

    def _steps_to_run(self, step: str) -> list[str]:
        if step == "all":
            return list(STEPS)
        names = ["tokens", step] if "tokens" in ALL_STEPS[step] else [step]
        needs = [
            need for name in names for need in ALL_STEPS[name] if need in self.pretrained and not self.is_done(need)
        ]
        return [*dict.fromkeys(needs), *names]

    def _check_needs(self, names: list[str]) -> None:
        """Check, before the first step starts, that every result needed by the steps in `names` exists."""
        given = {*names, *(set(STAGES) & set(self.start.trained))}
        for name in names:
            missing = [need for need in ALL_STEPS[name] if need not in given and not self.is_done(need)]
            if missing:
                raise ValueError(
                    f"the step {name} needs the result of {' and '.join(missing)}; "
                    f"first run musiclm train {missing[0]} with this --out"
                )
        needy = [stage for stage in STAGES if getattr(self.preset, stage).text_prob]
        if "mulan" not in self.pretrained:
            needy.append("mulan")
        for name in needy:
            if name in names and not self.is_done(name):
                self.require_captions(name)

    def _run_step(self, step: str) -> StepReport:
        started = time.monotonic()
        if (self.out / step / "finished.json").is_file() and not (self.out / step / "checkpoint").is_dir():
            self._remove_lost_step(step)
        with preserve_rng():
            # the initial weights depend on seed and step only, not on earlier steps of this process
            seed_rng(self.seed, step, device=self.accelerator.device)
            metrics: dict[str, Any] = {}
            if step in self.pretrained:
                self._save(step, self.pretrained[step], frozen=self.pretrained[step])
            elif step.removeprefix("melody-") in STAGES:
                metrics = self._train_stage(step)
            elif step == "tokens":
                self.tokens()
            else:
                metrics = getattr(self, f"_run_{step.replace('-', '_')}")()
        seconds = time.monotonic() - started + metrics.pop("earlier_seconds", 0.0)
        if self.accelerator.is_main_process:
            report = {
                "seconds": seconds,
                "metrics": metrics,
                "made_from": self._hashes(filter(self.is_done, ALL_STEPS[step])),
            }
            (self.out / step).mkdir(exist_ok=True)
            write_json(self.out / step / "report.json", report, sealed=True)
            for name in (*_TRAINING_FILES, step.removeprefix("melody-")):
                shutil.rmtree(self.out / step / name, ignore_errors=True)
        if step in self.pretrained:
            return StepReport(step, seconds, f"pretrained: {type(self.pretrained[step]).__name__}")
        values = [
            f"{key.partition('.')[2]} {value:.4g}"
            for key, value in metrics.items()
            if key.startswith(("valid.", "fitted.")) and value is not None
        ]
        return StepReport(step, seconds, "  ".join(values[:4]))

    def _remove_lost_step(self, step: str) -> None:
        """Remove the folder of a finished step whose result was deleted, so that the step is trained again."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            logger.warning("the result of the step %s is missing; the step is trained again", step)
            shutil.rmtree(self.out / step)
        self.accelerator.wait_for_everyone()

    # the folder of the run

    def _report(self, step: str) -> dict[str, Any]:
        file = self.out / step / "report.json"
        return read_record(file, seconds=float, made_from=dict) if file.is_file() else {}

    def _hashes(self, steps: Iterable[str]) -> dict[str, str]:
        """Hash the result files of each of the finished steps."""
        return {step: run_folder.hash_of(b"".join(file.read_bytes() for file in self._files(step))) for step in steps}

    def _check_fresh(self, step: str) -> None:
        """Check that the results of earlier steps have not changed since a step used them."""
        made_from = self._report(step).get("made_from", {})
        now = self._hashes(name for name in made_from if self.is_done(name))
        changed = [name for name, digest in now.items() if digest != made_from[name]]
        if changed:
            raise ValueError(
                f"the result of {' and '.join(changed)} has changed since {self.out / step} was computed; "
                f"delete {self.out / step} to compute the step again, or use another --out"
            )

    def _has_all_parts(self) -> bool:
        """Whether a model can be assembled, which has the stages to train further where they are not trained yet."""
        missing = [name for name in STEPS if not self.is_done(name)]
        has_trained = bool({*STAGES, *MELODY_STEPS} & set(self._steps_of_model()))
        return has_trained and all(name in STAGES and name in self.start.trained for name in missing)

    def _is_up_to_date(self) -> bool:
        """Whether the assembled model was computed from the current results of all steps."""
        card = read_record(self.model_folder / CARD) if self.is_complete else {}
        return card.get("made_from") == self._hashes(self._steps_of_model())

    def _steps_of_model(self) -> list[str]:
        """List the steps whose results are in the assembled model; melodies are part of it if all their steps ended."""
        steps = [step for step in STEPS if self.is_done(step)]
        return [*steps, *(MELODY_STEPS if all(self.is_done(step) for step in MELODY_STEPS) else ())]

    def _save(self, step: str, module: nn.Module, frozen: nn.Module | None = None) -> None:
        """Save the module of a step as fp16, so that later steps use the weights of the exported model.

        If fp16 would round weights of `frozen` (the module or a part of it), no weight of the module is rounded.
        """
        if self.accelerator.is_main_process:
            dtype = torch.float16 if frozen is None else exact_dtype(frozen, torch.float16)
            save_module(module.eval(), self.out / step / "model", dtype=dtype)
        self.accelerator.wait_for_everyone()

    def _load(self, step: str, kind: Any) -> Any:
        with preserve_rng():  # building a module consumes random numbers
            return load_module(self.out / step / "model", expect=kind, device=self.accelerator.device)

    def _run_codec(self) -> dict[str, Any]:
        trainer = codec_trainer(self.preset, self.items, codec=self.start.copy_of("codec"), **self._loop("codec"))
        metrics = self._train(trainer)
        self._save("codec", trainer.task.codec)
        return metrics

    def _run_semantic_tokenizer(self) -> dict[str, Any]:
        s, start = self.preset.semantic_tokenizer, self.start.copy_of("semantic-tokenizer")
        encoder, layer, num_clusters = None, s.layer, s.num_clusters
        if start is not None:
            encoder, layer, num_clusters = start.encoder.requires_grad_(True), start.layer, start.codebook_size
        loop = self._loop("semantic-tokenizer")
        trainer = semantic_tokenizer_trainer(self.preset, self.items, encoder=encoder, **loop)
        metrics = self._train(trainer)
        num_clusters = min(num_clusters, max(2, 10 * len(self.train_items)))
        fit = trainer.fit_tokenizer(layer=layer, num_clusters=num_clusters)
        self._save("semantic-tokenizer", fit.tokenizer)
        return {**metrics, "fitted.kmeans_explained": fit.usage.explained}

    def _run_mulan(self) -> dict[str, Any]:
        options = {"mulan": self.start.copy_of("mulan"), **self._loop("mulan")}
        trainer = mulan_trainer(self.preset, self.items, self.captions, **options)
        metrics = self._train(trainer)
        self._save("mulan", trainer.task.mulan)
        return metrics

    def _run_quantizer(self) -> dict[str, Any]:
        quantizer = build_quantizer(self.preset, self._load("mulan", JointEmbedding), len(self.train_items))
        quantizer.to(self.accelerator.device)
        report = fit_quantizer(quantizer, self.train_items, held_out=self.valid_items, seed=self.seed)
        self._save("quantizer", quantizer, frozen=quantizer.mulan)
        return {f"fitted.{name}": value for name, value in report.metrics.items()}

    @typed
    def tokens(self) -> tuple[TokenShards, TokenShards]:
        """Return tokens and MuLaN latents of the training files and the held-out files, computed where missing."""
        models = {
            "codec": self._load("codec", Codec),
            "semantic_tokenizer": self._load("semantic-tokenizer", SemanticTokenizer),
            "mulan": self._load("mulan", JointEmbedding),
        }
        return compute_token_split(self.tokens_folder, self.items, **models, accelerator=self.accelerator)

    def _run_melody(self) -> dict[str, Any]:
        trainer = melody_trainer(self.preset, self.items, **self._loop("melody"))
        metrics = self._train(trainer)
        self._save("melody", trainer.task.embedder)
        return metrics

    def _train_stage(self, step: str) -> dict[str, Any]:
        """Train a stage, or train it on with melodies."""
        stage, preset, shards = step.removeprefix("melody-"), self.preset, self.tokens()
        quantizer = self._load("quantizer", MuLaNEmbedQuantizer)
        options: dict[str, Any] = {}
        if step in self.start.trained:
            transformer = self.start.copy_of(step)
            warn_of_unread_captions(step, self.captions, getattr(preset, stage).text_prob)
            options["lora_rank"] = self.start.lora_rank
        elif step == stage:
            tokenizer, codec = self._load("semantic-tokenizer", SemanticTokenizer), self._load("codec", Codec)
            transformer = build_stage(preset, stage, codec=codec, tokenizer=tokenizer)
        else:
            config, embedder = preset.melody, self._load("melody", MelodyEmbedder)
            preset = replace(preset, **{stage: replace(getattr(preset, stage), run=config.stage_run)})
            transformer = self.start.copy_of(stage)
            if self.is_done(stage):
                self._load_table(quantizer, stage, stage)
                transformer = self._load(stage, PARTS[stage])
            if MELODY not in transformer.further_conditions:
                transformer = transformer.with_condition(MELODY, embedder.dim_latent, config.drop_prob)
            given = {"stage": transformer, "seed": self.seed, "accelerator": self.accelerator}
            train, valid = (
                compute_melodies(self.out / "melody" / tokens.folder.name, items, tokens, embedder, **given)
                for tokens, items in zip(shards, self.items)
            )
            shards = train, valid
        sampler = None if stage == "semantic" else StageSampler(self._load("codec", Codec))
        options |= {"shards": shards, "audio_conditioner": quantizer, "sampler": sampler}
        metrics = self._train(stage_trainer(preset, transformer, stage, **options, **self._loop(step)))
        self._save(step, transformer)
        return metrics

    def _load_table(self, quantizer: MuLaNEmbedQuantizer, stage: str, step: str) -> None:
        """Load the embeddings of conditioning codes that a step has trained for a stage."""
        file = self.out / step / TABLE_FILE
        load_weights(quantizer.table(stage), read_weights(file, sealed=True)[0], where=str(file))

    def _loop(self, step: str) -> dict[str, Any]:
        return dict(
            results_folder=self.out / step,
            accelerator=self.accelerator,
            seed=self.seed,
            allow_changed=self.allow_changed,
            num_workers=self.num_workers,
            freeze=self.start.freeze,
        )

    def _train(self, trainer: Any) -> dict[str, Any]:
        """Train to the last step; return the last metrics, with the time of interrupted runs as `earlier_seconds`."""
        started = time.monotonic()
        result = trainer.train()
        total = float(read_record(trainer.results_folder / "finished.json", seconds=float)["seconds"])
        return {**result.metrics, "earlier_seconds": max(0.0, total - (time.monotonic() - started))}

    # the model

    def assemble(self) -> Path:
        """Write the trained modules of all steps as one fp16 model folder, and return the path of the folder."""
        self.accelerator.wait_for_everyone()  # until all processes have found that there is no model
        if self.accelerator.is_main_process:
            steps = self._steps_of_model()
            trained = {name: f"melody-{name}" if f"melody-{name}" in steps else name for name in PARTS}
            parts = {
                name: self._load(step, PARTS[name]) if self.is_done(step) else self.start.copy_of(step)
                for name, step in ((name, step.replace("_", "-")) for name, step in trained.items())
            }
            if "melody" in steps:
                parts["melody"] = self._load("melody", MelodyEmbedder)
            elif "melody" in self.pretrained:
                parts["melody"] = self.pretrained["melody"]
            sampling = {}
            for stage in STAGES:
                if self.is_done(trained[stage]):
                    self._load_table(parts["quantizer"], stage, trained[stage])
                config = getattr(self.preset, stage)
                sampling[stage] = {"temperature": config.temperature, "guidance_scale": config.guidance_scale}
            about = {"preset": self.preset.name, "seed": self.seed, "sampling": sampling} | self.start.about
            musiclm = MusicLM.of_parts(parts, about, self.out)
            self._write_samples(musiclm)
            card = card_text(musiclm)
            save_parts(self.model_folder, parts, {**about, "made_from": self._hashes(steps)}, dtype=torch.float16)
            write_card(self.model_folder, card)
        self.accelerator.wait_for_everyone()
        return self.model_folder

    def _write_samples(self, musiclm: MusicLM) -> None:
        """Write music for the first captions of held-out files to `OUT/samples`."""
        seconds = min(self.preset.semantic.run.seconds, MAX_SAMPLE_SECONDS)
        generate = partial(musiclm, num_samples=1, seconds=seconds, seed=self.seed)
        write_samples(self.out / "samples", self.valid_items, generate, musiclm.sample_hz)
