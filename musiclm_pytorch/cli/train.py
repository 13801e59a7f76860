"""`musiclm train STEP`: run one step, or all steps, of the training pipeline."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import check_at_least
from musiclm_pytorch.cli.parts import PartOptions
from musiclm_pytorch.cli.settings import PresetOptions, print_settings

__all__ = ["Train"]


@dataclass(frozen=True, kw_only=True)
class Train(PresetOptions, PartOptions):
    """Run one step of the training pipeline, or all steps in order.

    To continue an interrupted training, run the same command again. To train a semantic tokenizer on a layer of any
    encoder, see `musiclm train kmeans --help`; to train a MusicGen, see `musiclm train musicgen --help`.

    The presets are tiny (two CPU cores), small (one GPU), paper (the sizes of MusicLM), and finetune and lora (with
    --from). Every setting of a preset is an option, for example `--semantic.run.learning-rate 1e-4`; `musiclm train all
    --print-config` lists them.
    """

    step: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STEP")]
    """all, or one of: codec, semantic-tokenizer, mulan, quantizer, tokens, semantic, coarse, fine. Optional steps (not
    in all) add melodies to the stages of the run or of --from: melody, melody-semantic, melody-coarse; they need the
    label pitch_class (notes) in the manifest."""
    preset: str | None = None
    """Sizes and training settings; by default tiny, with --from finetune (not for melodies), with --lora-rank lora."""
    from_model: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Train this model further: tiny (bundled), a folder, or a hub id. The stages of a MusicLM are trained on captions,
    with its other parts unchanged. The steps codec, semantic-tokenizer and mulan also accept a model of one part."""
    lora_rank: int | None = None
    """With --from: train low-rank updates of this rank (LoRA) of the stages instead of all weights."""
    freeze: tuple[str, ...] = ()
    """With --from: names of parameters that are not trained, or parts of names, such as embedding or blocks.0."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""
    tokens: Path | None = None
    """Folder of tokens that musiclm tokenize has computed with the same data and parts, instead of OUT/tokens. Missing
    tokens are computed."""
    allow_changed: tuple[str, ...] = ()
    """Names of settings that may differ from those of the interrupted run, such as batch_size or num_train_steps."""
    dry_run: bool = False
    """Print parameters, tokens, epochs, chance loss, memory, disk space and estimated time. Nothing is written."""
    dry_run_device: str | None = None
    """Like --dry-run, with the estimated time on this GPU, such as a100, instead of a measurement on this machine."""

    @staticmethod
    def presets() -> dict[str, Any]:
        """Return the presets by name."""
        from musiclm_pytorch.pipeline.presets import PRESETS

        return PRESETS

    def execute(self) -> int:
        """Run the selected steps and print a line for each step."""
        from audiolm_pytorch.training.distributed import create_accelerator
        from musiclm_pytorch.pipeline.pipeline import Pipeline
        from musiclm_pytorch.pipeline.presets import preset_named
        from musiclm_pytorch.pipeline.steps import MELODY_STEPS, check_step

        if self.step in ("kmeans", "musicgen"):
            raise ValueError(f"{self.step} must be the first word after train; see musiclm train {self.step} --help")
        check_step(self.step)
        if self.from_model is None and (self.lora_rank is not None or self.freeze):
            raise ValueError("--lora-rank and --freeze need --from; add the model to train further")
        if self.lora_rank is not None and self.step in MELODY_STEPS:
            raise ValueError(f"the step {self.step} trains all weights; leave out --lora-rank")
        default = "finetune" if self.lora_rank is None else "lora"
        if self.from_model is None or self.step in MELODY_STEPS:
            default = "tiny"
        preset = self.resolved(preset_named(self.preset or default))
        if self.print_config:
            print_settings(preset)
            return 0
        check_at_least(self, num_workers=0, lora_rank=1)
        data, out = self.folders()
        parts = self.pretrained_parts()
        # without these options, the pipeline creates an Accelerator when it needs one
        needs_own = self.track or self.timeout_seconds is not None
        accelerator = create_accelerator(self.track, out / "trackers", self.timeout_seconds) if needs_own else None
        pipeline = Pipeline(
            preset,
            data=data,
            out=out,
            seed=self.seed,
            accelerator=accelerator,
            pretrained=parts,
            start=self._start(),
            allow_changed=self.allow_changed,
            num_workers=self.num_workers,
            tokens_folder=self.tokens,
        )
        if self.dry_run or self.dry_run_device is not None:
            from musiclm_pytorch.pipeline.estimate import estimate

            print(estimate(pipeline, self.step, self.dry_run_device))
            return 0
        total_seconds = 0.0
        for report in pipeline.run(self.step, announce=_announce):
            total_seconds += report.seconds
            if pipeline.accelerator.is_main_process:
                print(f"{report.step:20} {_duration(report.seconds)}  {report.summary}".rstrip(), flush=True)
        if not pipeline.accelerator.is_main_process:
            return 0
        print(f"{'total':20} {_duration(total_seconds)}")
        if pipeline.is_complete:
            folder = shlex.quote(str(pipeline.model_folder))
            text = shlex.quote(next(iter(pipeline.captions), "a slow waltz"))
            line = f"model in {pipeline.model_folder}; try: musiclm generate {text} --model {folder}"
            print(printable(line))
        return 0

    def _start(self) -> Any:
        """Load the model to train further."""
        if self.from_model is None:
            return None
        from musiclm_pytorch.musiclm import MusicLM
        from musiclm_pytorch.pipeline.fine_tuning import START_KINDS, FineTuning

        if self.step == "quantizer":
            raise ValueError(f"the step {self.step} trains no model further; leave out --from, or choose another step")
        model = START_KINDS.get(self.step, MusicLM).from_pretrained(**self.source_of(self.from_model))
        return FineTuning(model=model, lora_rank=self.lora_rank, freeze=self.freeze)


def _announce(step: str) -> None:
    """Print the name of a step that starts, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"{step} ...", file=sys.stderr)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:7.1f} min" if seconds >= 60 else f"{seconds:7.1f} s  "
