"""A preset that trains every step in seconds, the `musiclm` command with it, and clips to train on.

    python micro.py train all --preset micro --data DIR --out DIR

With MICRO_KILL=<step> in the environment the process kills itself (SIGKILL) inside that step.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from audiolm_pytorch.lm.task import StageObjective
from musiclm_pytorch.pipeline import presets as config
from musiclm_pytorch.pipeline.presets import (
    MelodyConfig,
    MuLaNConfig,
    Preset,
    QuantizerConfig,
    RunConfig,
    SemanticConfig,
    SpectralCodecConfig,
    StageConfig,
)

WORDS = ("low", "middle", "high", "very high")


def _run(seconds: float = 1.0, **changes: Any) -> RunConfig:
    run = RunConfig(12, 4, seconds, 1e-3, warmup_steps=2, precision="fp32", checkpoint_every_steps=3)
    return replace(run, **changes)


_FINE_OBJECTIVE = StageObjective(level_drop_prob=0.2, history_noise=0.5, input_noise=0.2, level_weights=(2.0, 1.0))
_STAGE = StageConfig(
    dim=32,
    depth=1,
    heads=2,
    dropout=0.1,
    cond_drop_prob=0.1,
    objective=StageObjective(level_drop_prob=0.2),
    run=_run(precision="bf16"),
)

MICRO = Preset(
    name="micro",
    codec=SpectralCodecConfig(
        sample_hz=16000,
        hop_samples=320,
        dim=32,
        encoder_depth=1,
        decoder_depth=1,
        codebook_size=16,
        num_quantizers=3,
        code_dim=8,
        run=_run(0.5),
    ),
    semantic_tokenizer=SemanticConfig(dim=32, depth=2, heads=2, layer=1, num_clusters=12, run=_run()),
    mulan=MuLaNConfig(
        dim=32, depth=1, heads=2, num_mels=32, n_fft=400, text_vocab_size=300, text_max_tokens=24, run=_run()
    ),
    quantizer=QuantizerConfig(num_quantizers=2, codebook_size=4),
    semantic=_STAGE,
    coarse=replace(
        _STAGE,
        objective=StageObjective(level_drop_prob=0.2, history_noise=0.5),
        semantic_lookahead_seconds=0.08,
        guide_semantic=True,
    ),
    fine=replace(_STAGE, dim=16, run=_run(0.5), objective=_FINE_OBJECTIVE),
    num_coarse_quantizers=1,
    melody=MelodyConfig(
        **{"dim": 16, "depth": 1, "heads": 2, "sample_hz": 8000, "num_mels": 40, "n_fft": 512, "hop_length": 256},
        **{"patch_size": 20, "dim_latent": 8, "num_quantizers": 2, "codebook_size": 8, "drop_prob": 0.4},
        run=_run(),
        stage_run=_run(),
    ),
)


def write_clips(folder: Path, num_clips: int = 10, captions: bool = True) -> Path:
    """Captioned 1-s tones with a manifest, or bare files."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(num_clips):
        kind = number % len(WORDS)
        time = np.arange(24000) / 24000
        noise = np.random.default_rng(number).standard_normal(24000)
        wave = 0.3 * np.sin(2 * np.pi * 220 * 2**kind * time) * np.exp(-3 * (time % 0.25)) + 0.02 * noise
        soundfile.write(folder / f"{number:02d}.wav", wave, 24000)
        rows.append(json.dumps({"audio": f"{number:02d}.wav", "caption": f"a {WORDS[kind]} tone, take {number}"}))
    if captions:
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _kill_inside(stage: str) -> None:
    """Kill this process in the middle of a step."""
    from audiolm_pytorch.training.optimizer import PhaseOptimizer
    from audiolm_pytorch.training.run import TrainingRun
    from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if stage == "quantizer":
        MuLaNEmbedQuantizer.fit = killed
        return
    if stage == "tokens":
        from musiclm_pytorch.pipeline import token_shards as tokens

        write = tokens.write_shards

        def write_or_die(folder: Path, make_record: Any, *rest: Any, **named: Any) -> int:
            """Kill in the fourth record."""
            return write(folder, lambda index: killed() if index == 3 else make_record(index), *rest, **named)

        tokens.write_shards = write_or_die
        return
    steps = TrainingRun._step
    step = PhaseOptimizer.step

    def step_or_die(self: TrainingRun, loaded: Any) -> None:
        """Kill after the eighth update of the weights; a checkpoint has the first six."""
        if self.folder.name == stage and self.progress.step == 7:
            PhaseOptimizer.step = lambda *arguments: (step(*arguments), killed())
        steps(self, loaded)

    TrainingRun._step = step_or_die


if __name__ == "__main__":
    config.PRESETS["micro"] = MICRO
    from musiclm_pytorch.cli import main

    if os.environ.get("MICRO_KILL"):
        _kill_inside(os.environ["MICRO_KILL"])
    sys.exit(main())
