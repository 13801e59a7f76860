"""`musiclm train`: every stage of a preset in order, each continued where it stopped."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from beartype import beartype
from torch import nn

from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.codecs.training import MEL_ONLY, SoundStreamTrainer
from audiolm_pytorch.data.manifest import captions_of, training_items
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.lm.trainers import (
    TABLE_FILE,
    CoarseTransformerTrainer,
    FineTransformerTrainer,
    SemanticTransformerTrainer,
)
from audiolm_pytorch.saving.files import read_json, read_weights, write_json
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import save_module
from audiolm_pytorch.saving.weights import load_weights
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer
from audiolm_pytorch.training.distributed import create_accelerator
from audiolm_pytorch.training.rng import preserve_rng, seed_rng
from musiclm_pytorch.mulan import JointEmbedding
from musiclm_pytorch.mulan.captions import CaptionSampler, aspects_of
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from musiclm_pytorch.pipeline.builders import (
    LANGUAGE_MODELS,
    build_codec,
    build_language_model,
    build_mulan,
    build_quantizer,
    build_semantic_encoder,
    build_semantic_objective,
)
from musiclm_pytorch.pipeline.presets import Preset, RunConfig
from musiclm_pytorch.pipeline.pretrained_parts import PRETRAINED_KINDS, check_pretrained, exact_dtype, load_part
from musiclm_pytorch.pipeline.run_folder import (
    check_run_folder,
    digest_of,
    lock_folder,
    read_record,
    remove_partial_files,
)
from musiclm_pytorch.pipeline.token_shards import compute_tokens
from musiclm_pytorch.pretrained.model_folder import CARD, PARTS, save_parts
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.quantizer.fit import fit_quantizer

if TYPE_CHECKING:
    import accelerate

__all__ = ["STEPS", "Pipeline", "StepReport", "check_step"]

# Each with the stages whose result it needs.
STEPS: dict[str, tuple[str, ...]] = {
    "codec": (),
    "semantic-tokenizer": (),
    "mulan": (),
    "quantizer": ("mulan",),
    "tokens": ("semantic-tokenizer", "codec", "mulan"),
    "semantic": ("tokens", "quantizer"),
    "coarse": ("tokens", "quantizer"),
    "fine": ("tokens", "quantizer"),
}


@dataclass(frozen=True)
class StepReport:
    """How a stage went: its name, wall time in seconds over all sessions, and a line of figures."""

    step: str
    seconds: float
    summary: str


@beartype
def check_step(step: str) -> None:
    """Refuse a word that is neither "all" nor a stage, naming those there are, by a ValueError."""
    if step != "all" and step not in STEPS:
        raise ValueError(f"there is no step {step!r}; choose all or one of: {', '.join(STEPS)}")


class Pipeline:
    """All stages of a run over one folder of audio, in one output folder.

    A finished stage leaves `OUT/<stage>/model`; tokens are computed once into `OUT/tokens`; the assembled model is
    `OUT/model`. Nothing is written before `run`.

    A chain may also be trained around finished parts: any codec, semantic tokenizer or joint embedding that can be
    saved. The stage of such a part trains nothing and keeps the part as its result, without rounding it.

    Args:
        preset: Sizes and steps.
        data: Folder of audio or JSONL manifest.
        out: Folder of the run; made if missing. A folder belongs to one preset, seed, list of files and given parts.
        seed: Of weights, data order and noise.
        accelerator: Shared by all stages; one is made if not given.
        given: Finished modules for the stages "codec", "semantic-tokenizer" and "mulan", as far as there are any.

    Raises:
        ValueError: If the data cannot be read, `out` is a file, or a given part is of another kind or does not fit the
            preset.
    """

    @beartype
    def __init__(
        self,
        preset: Preset,
        *,
        data: str | Path,
        out: str | Path,
        seed: int = 0,
        accelerator: "accelerate.Accelerator | None" = None,
        pretrained: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.preset, self.data, self.out, self.seed = preset, Path(data), Path(out), seed
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        blocked = next(place for place in (self.out.absolute(), *self.out.absolute().parents) if place.exists())
        if not blocked.is_dir():
            raise ValueError(f"{blocked} is a file; name a folder with --out")
        self.train_items, self.valid_items = training_items(self.data, None, min_seconds=1.0)
        self.pretrained = dict(pretrained or {})
        check_pretrained(preset, self.pretrained)
        self._accelerator = accelerator

    # what there is

    @cached_property
    def accelerator(self) -> "accelerate.Accelerator":
        """The Accelerator that every stage shares."""
        return self._accelerator or create_accelerator()

    @property
    def model_folder(self) -> Path:
        """Where the assembled model is."""
        return self.out / "model"

    @property
    def is_complete(self) -> bool:
        """Whether every stage is done and the model assembled."""
        return (self.model_folder / CARD).is_file()

    @property
    def captions(self) -> list[str]:
        """Every caption and aspect of the training files."""
        return [text for item in self.train_items for text in (*captions_of(item), *aspects_of(item))]

    @beartype
    def is_done(self, stage: str) -> bool:
        """Whether a stage has left its result."""
        return all(file.is_file() for file in self._files(stage))

    def _files(self, stage: str) -> list[Path]:
        """The files that a finished stage leaves, by which later stages know it."""
        if stage == "tokens":
            return [self.out / stage / part / "index.json" for part in ("train", "valid")]
        return [self._result(stage) / file for file in ("config.json", "model.safetensors")]

    def _result(self, stage: str) -> Path:
        return self.out / stage / "model"

    # running

    @beartype
    def run(self, stage: str = "all", announce: Callable[[str], None] | None = None) -> Iterator[StepReport]:
        """Run one stage, or all that are not done, and report each as it ends.

        Args:
            stage: Name of a stage, or "all". Tokens are computed, and given parts kept, whenever a stage needs them.
            announce: Called with the name of each stage that starts.

        Yields:
            A report for each stage, also for those that were done before.

        Raises:
            ValueError: If there is no such stage, what it needs is missing, or the folder holds another run.
        """
        check_step(stage)
        names = self._names(stage)
        self._check_needs(names)
        with lock_folder(self.out) if self.accelerator.is_main_process else nullcontext():
            self._check_run_folder()
            for name in names:
                if self.is_done(name):
                    self._check_fresh(name)
                    yield StepReport(name, self._seconds(name), "done before")
                    continue
                if announce is not None:
                    announce(name)
                yield self._timed(name)
            if all(self.is_done(name) for name in STEPS) and not self._is_assembled():
                self.assemble()

    def _names(self, stage: str) -> list[str]:
        """The stages that a request stands for, in order."""
        if stage == "all":
            return list(STEPS)
        names = ["tokens", stage] if "tokens" in STEPS[stage] else [stage]
        needs = [need for name in names for need in STEPS[name] if need in self.pretrained and not self.is_done(need)]
        return [*dict.fromkeys(needs), *names]

    def _check_needs(self, names: list[str]) -> None:
        """Refuse what cannot be run, before anything is written or hours are spent on the stages before it."""
        for name in names:
            missing = [need for need in STEPS[name] if need not in names and not self.is_done(need)]
            if missing:
                raise ValueError(
                    f"{name} needs {' and '.join(missing)} first: musiclm train {missing[0]} with this --out"
                )
        if "mulan" in names and not self.is_done("mulan") and "mulan" not in self.pretrained:
            self.require_captions()

    def require_captions(self) -> None:
        """Raise a ValueError if there is no caption that MuLaN could learn from."""
        if not self.captions:
            raise ValueError(
                f"{self.data} has no captions, and mulan learns from them; give a train.jsonl with 'audio' and "
                "'caption' in every line"
            )

    def _timed(self, stage: str) -> StepReport:
        started = time.monotonic()
        runner: Callable[[], dict[str, Any]] = getattr(self, f"_run_{stage.replace('-', '_')}")
        if stage in self.pretrained:
            runner = partial(self._keep_pretrained, stage)
        if self.accelerator.is_main_process:
            remove_partial_files(self.out / stage)
        # Nobody may have begun to write what would be swept away.
        self.accelerator.wait_for_everyone()
        with preserve_rng():
            # initial weights are a pure function of seed and stage, whichever stages ran before in this process
            seed_rng(self.seed, stage, device=self.accelerator.device)
            metrics = runner()
        # steps of earlier sessions are in the loop's own count
        seconds = time.monotonic() - started + metrics.pop("earlier_seconds", 0.0)
        if self.accelerator.is_main_process:
            report = {"seconds": seconds, "metrics": metrics, "made_from": self._digests(STEPS[stage])}
            write_json(self.out / stage / "report.json", report)
        figures = [
            f"{key.partition('.')[2]} {value:.4g}"
            for key, value in metrics.items()
            if key.startswith(("valid.", "fitted.")) and value is not None
        ]
        summary = (
            f"pretrained: {type(self.pretrained[stage]).__name__}"
            if stage in self.pretrained
            else "  ".join(figures[:4])
        )
        return StepReport(stage, seconds, summary)

    def _digests(self, stages: Iterable[str]) -> dict[str, str]:
        """Hash of what each of some finished stages left."""
        return {name: digest_of(b"".join(file.read_bytes() for file in self._files(name))) for name in stages}

    def _check_fresh(self, stage: str) -> None:
        """Refuse a result that was made from something that has been made anew since."""
        report = self.out / stage / "report.json"
        made_from = read_record(report).get("made_from", {}) if report.is_file() else {}
        now = self._digests(name for name in made_from if self.is_done(name))
        changed = [name for name, digest in now.items() if digest != made_from[name]]
        if changed:
            raise ValueError(
                f"{self.out / stage} was made from another {' and '.join(changed)} than there is now; "
                "remove that folder to make it again, or use another --out"
            )

    def _is_assembled(self) -> bool:
        """Whether the model is there and of the present stages."""
        return self.is_complete and read_record(self.model_folder / CARD).get("made_from") == self._digests(STEPS)

    def _seconds(self, stage: str) -> float:
        report = self.out / stage / "report.json"
        return float(read_record(report).get("seconds", 0.0)) if report.is_file() else 0.0

    def _check_run_folder(self) -> None:
        """Write down what this folder is a run of, or refuse a folder of another run."""
        # relative, so that a corpus may move and may be named in any way
        root = (self.data.parent if self.data.is_file() else self.data).resolve()
        paths = sorted(os.path.relpath(item.path.resolve(), root) for item in [*self.train_items, *self.valid_items])
        facts = {
            "preset": asdict(self.preset),
            "seed": self.seed,
            "num_files": len(paths),
            "files": digest_of("\n".join(paths).encode()),
            "captions": digest_of("\n".join(self.captions).encode()),
        }
        # a run that says nothing of given parts has trained all of them itself
        trained = {"pretrained": dict.fromkeys(PRETRAINED_KINDS, "none")}
        if self.pretrained:
            known = {stage: part_fingerprint(part) for stage, part in self.pretrained.items()}
            facts["pretrained"] = {**trained["pretrained"], **known}
        check_run_folder(self.out, facts, write=self.accelerator.is_main_process, unsaid=trained)

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
            checkpoint_every_steps=run.checkpoint_every_steps,
        )

    def _train(self, trainer: Any) -> dict[str, Any]:
        """Train to the end; the newest metrics, and the seconds that earlier sessions spent."""
        started = time.monotonic()
        result = trainer.train()
        total = float(read_json(trainer.results_folder / "finished.json")["seconds"])
        return {**result.metrics, "earlier_seconds": max(0.0, total - (time.monotonic() - started))}

    # tokenizers and MuLaN

    def _keep_pretrained(self, stage: str) -> dict[str, Any]:
        self._keep(stage, self.pretrained[stage], frozen=self.pretrained[stage])
        return {}

    def _run_codec(self) -> dict[str, Any]:
        run = self.preset.codec.run
        trainer = SoundStreamTrainer(
            build_codec(self.preset),
            items=(self.train_items, self.valid_items),
            data_max_length_seconds=run.seconds,
            loss_weights=MEL_ONLY,
            **self._loop("codec", run),
        )
        metrics = self._train(trainer)
        self._keep("codec", trainer.task.codec)
        return metrics

    def _run_semantic_tokenizer(self) -> dict[str, Any]:
        s = self.preset.semantic_tokenizer
        encoder = build_semantic_encoder(self.preset)
        trainer = SemanticTokenizerTrainer(
            encoder=encoder,
            objective=build_semantic_objective(self.preset, encoder),
            items=(self.train_items, self.valid_items),
            seconds=s.run.seconds,
            **self._loop("semantic-tokenizer", s.run),
        )
        metrics = self._train(trainer)
        num_clusters = min(s.num_clusters, max(2, 10 * len(self.train_items)))
        fit = trainer.fit_tokenizer(layer=s.layer, num_clusters=num_clusters)
        self._keep("semantic-tokenizer", fit.tokenizer)
        return {**metrics, "fitted.kmeans_explained": fit.usage.explained}

    def _run_mulan(self) -> dict[str, Any]:
        run = self.preset.mulan.run
        trainer = MuLaNTrainer(
            mulan=build_mulan(self.preset, self.captions),
            items=(self.train_items, self.valid_items),
            seconds=run.seconds,
            captions=CaptionSampler(caption_dropout=self.preset.mulan.caption_dropout, seed=self.seed),
            chunk_size=self.preset.mulan.chunk_size,
            **self._loop("mulan", run),
        )
        metrics = self._train(trainer)
        self._keep("mulan", trainer.task.mulan)
        return metrics

    def _run_quantizer(self) -> dict[str, Any]:
        quantizer = build_quantizer(self.preset, self._load("mulan", JointEmbedding), len(self.train_items))
        quantizer.to(self.accelerator.device)
        report = fit_quantizer(quantizer, self.train_items, held_out=self.valid_items, seed=self.seed)
        self._keep("quantizer", quantizer, frozen=quantizer.mulan)
        return {f"fitted.{name}": value for name, value in report.metrics.items()}

    def _keep(self, stage: str, module: nn.Module, frozen: nn.Module | None = None) -> None:
        """Save a stage's result as fp16, so that whatever is computed with it holds for the exported model too.

        A result in which something is `frozen` that fp16 would change is saved as it is.
        """
        if self.accelerator.is_main_process:
            dtype = torch.float16 if frozen is None else exact_dtype(frozen, torch.float16)
            save_module(module.eval(), self._result(stage), dtype=dtype)
        self.accelerator.wait_for_everyone()

    def _load(self, stage: str, kind: Any) -> Any:
        with preserve_rng():  # whatever a part is built with, it moves no initial weights
            return load_part(self._result(stage), kind, device=self.accelerator.device)

    # tokens

    @beartype
    def tokens(self) -> list[TokenShards]:
        """Semantic tokens, codes and MuLaN latents of every training and every held-out file, computed once."""
        makers = {
            "codec": self._load("codec", Codec),
            "semantic_tokenizer": self._load("semantic-tokenizer", SemanticTokenizer),
            "mulan": self._load("mulan", JointEmbedding),
        }
        return [
            compute_tokens(
                self.out / "tokens" / part, items, **makers, origin={"part": part}, accelerator=self.accelerator
            )
            for part, items in (("train", self.train_items), ("valid", self.valid_items))
        ]

    def _run_tokens(self) -> dict[str, Any]:
        self.tokens()
        return {}

    # language models

    def _run_semantic(self) -> dict[str, Any]:
        return self._train_language_model("semantic", SemanticTransformerTrainer)

    def _run_coarse(self) -> dict[str, Any]:
        return self._train_language_model("coarse", CoarseTransformerTrainer)

    def _run_fine(self) -> dict[str, Any]:
        return self._train_language_model("fine", FineTransformerTrainer)

    def _train_language_model(self, stage: str, trainer_class: Callable[..., Any]) -> dict[str, Any]:
        run, config = getattr(self.preset, stage).run, getattr(self.preset, stage)
        tokenizer, codec = self._load("semantic-tokenizer", SemanticTokenizer), self._load("codec", Codec)
        transformer = build_language_model(self.preset, stage, codec=codec, tokenizer=tokenizer)
        shards, valid_shards = self.tokens()
        trainer = trainer_class(
            transformer=transformer,
            audio_conditioner=self._load("quantizer", MuLaNEmbedQuantizer),
            shards=shards,
            valid_shards=valid_shards,
            data_max_length_seconds=run.seconds,
            level_drop_prob=config.level_drop_prob,
            text_prob=config.text_prob,
            **self._loop(stage, run),
        )
        metrics = self._train(trainer)
        self._keep(stage, transformer)
        return metrics

    # the whole

    def assemble(self) -> Path:
        """Write the model, as fp16: every part, with the trained conditioning tables in the quantizer.

        Returns:
            The model's folder.
        """
        # Every process must have seen that there is no model before the first one writes it.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            remove_partial_files(self.model_folder)
            parts = {name: self._load(name.replace("_", "-"), kind) for name, kind in PARTS.items()}
            for stage in LANGUAGE_MODELS:
                file = self.out / stage / TABLE_FILE
                load_weights(parts["quantizer"].table(stage), read_weights(file)[0], where=str(file))
            settings = {name: getattr(self.preset, name) for name in LANGUAGE_MODELS}
            sampling = {
                name: {"temperature": config.temperature, "guidance_scale": config.guidance_scale}
                for name, config in settings.items()
            }
            about = {
                "preset": self.preset.name,
                "seed": self.seed,
                "sampling": sampling,
                "made_from": self._digests(STEPS),
            }
            save_parts(self.model_folder, parts, about, dtype=torch.float16)
        self.accelerator.wait_for_everyone()
        return self.model_folder
