"""Presets: every number of a run, in frozen dataclasses.

A preset says what is built and how long each stage trains. Constructors of modules take numbers, never a preset:
`musiclm_pytorch.pipeline.builders` turns one into the other.
"""

import math
from dataclasses import dataclass, replace

from beartype import beartype

__all__ = [
    "PRESETS",
    "CodecConfig",
    "MuLaNConfig",
    "Preset",
    "QuantizerConfig",
    "RunConfig",
    "SemanticConfig",
    "StageConfig",
    "preset_named",
]


@dataclass(frozen=True)
class RunConfig:
    """How long and on what one thing trains.

    Attributes:
        num_train_steps: Optimizer steps.
        batch_size: Clips a step.
        seconds: Length of a crop.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear warm-up.
        precision: "fp32" or "bf16" (autocast; the products run several times as fast on a CPU with bf16 units).
        checkpoint_every_steps: Steps between checkpoints, besides one every two minutes.
    """

    num_train_steps: int
    batch_size: int
    seconds: float
    learning_rate: float
    warmup_steps: int = 100
    precision: str = "bf16"
    checkpoint_every_steps: int | None = None


@dataclass(frozen=True)
class CodecConfig:
    """The spectral SoundStream: its rate in Hz, width, blocks, samples a frame, and codes."""

    sample_hz: int
    hop_samples: int
    dim: int
    encoder_depth: int
    decoder_depth: int
    codebook_size: int
    num_quantizers: int
    code_dim: int
    run: RunConfig


@dataclass(frozen=True)
class SemanticConfig:
    """The BEST-RQ encoder and its k-means tokens: width, blocks, the clustered layer, clusters.

    Waves are read at `sample_hz` (16000 or 24000) and become `token_hz` (25 or 50) tokens a second.
    """

    dim: int
    depth: int
    heads: int
    layer: int
    num_clusters: int
    run: RunConfig
    sample_hz: int = 16000
    token_hz: int = 25


@dataclass(frozen=True)
class MuLaNConfig:
    """Both towers, and how they are trained.

    Width and blocks; mel bands and FFT length (samples) of audio; vocabulary and length of texts. In training, the
    share of audio patches left out, the probability that a part of a caption is, and how many clips are embedded at a
    time (None = the batch).
    """

    dim: int
    depth: int
    heads: int
    num_mels: int
    n_fft: int
    text_vocab_size: int
    text_max_tokens: int
    run: RunConfig
    patch_dropout: float = 0.0
    caption_dropout: float = 0.0
    chunk_size: int | None = None


@dataclass(frozen=True)
class QuantizerConfig:
    """MuLaN conditioning codes: levels and codes a level; a few thousand clips cannot fill MusicLM's 12 x 1024."""

    num_quantizers: int
    codebook_size: int


@dataclass(frozen=True)
class StageConfig:
    """One token language model.

    Width, blocks, heads, dropout, how often training drops the condition or its trailing levels, how often it
    conditions on a caption's codes instead of the recording's own, and how it is sampled: temperature and guidance
    scale (1 = none).
    """

    dim: int
    depth: int
    heads: int
    dropout: float
    cond_drop_prob: float
    level_drop_prob: float
    run: RunConfig
    temperature: float = 1.0
    guidance_scale: float = 1.0
    text_prob: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A whole model.

    Attributes:
        name: What the command line calls it.
        num_coarse_quantizers: Codec levels that the coarse stage predicts; the fine stage predicts the rest.
    """

    name: str
    codec: CodecConfig
    semantic_tokenizer: SemanticConfig
    mulan: MuLaNConfig
    quantizer: QuantizerConfig
    semantic: StageConfig
    coarse: StageConfig
    fine: StageConfig
    num_coarse_quantizers: int

    @beartype
    def scaled(self, scale: float | int) -> "Preset":
        """The same model with every step count multiplied by `scale` (at least ten steps each).

        Raises:
            ValueError: If `scale` is not a positive number.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive, got {scale}; 1 is the full run")
        if scale == 1:
            return self
        parts = {}
        for name in ("codec", "semantic_tokenizer", "mulan", "semantic", "coarse", "fine"):
            part = getattr(self, name)
            steps = max(10, round(part.run.num_train_steps * scale))
            warmup = min(part.run.warmup_steps, max(1, steps // 10))
            parts[name] = replace(part, run=replace(part.run, num_train_steps=steps, warmup_steps=warmup))
        return replace(self, **parts)


# Two CPU cores, about an hour and a half, at most 40 MB as fp16. Sizes and steps were chosen by the trials that
# recipes/README.md lists.
_TINY = Preset(
    name="tiny",
    codec=CodecConfig(
        sample_hz=16000,
        hop_samples=320,
        dim=256,
        encoder_depth=4,
        decoder_depth=6,
        codebook_size=1024,
        num_quantizers=4,
        code_dim=16,
        run=RunConfig(6000, 16, 1.0, 1e-3),
    ),
    semantic_tokenizer=SemanticConfig(
        dim=192, depth=4, heads=3, layer=3, num_clusters=512, run=RunConfig(1200, 16, 5.0, 1e-3)
    ),
    mulan=MuLaNConfig(
        dim=192,
        depth=4,
        heads=3,
        num_mels=64,
        n_fft=1024,
        text_vocab_size=1024,
        text_max_tokens=64,
        run=RunConfig(800, 64, 5.0, 7e-4),
        patch_dropout=0.25,
    ),
    quantizer=QuantizerConfig(num_quantizers=12, codebook_size=8),
    semantic=StageConfig(
        dim=192,
        depth=6,
        heads=3,
        dropout=0.1,
        cond_drop_prob=0.1,
        level_drop_prob=0.2,
        run=RunConfig(1200, 32, 5.0, 1e-3),
        temperature=1.0,
        guidance_scale=3.0,
    ),
    coarse=StageConfig(
        dim=192,
        depth=6,
        heads=3,
        dropout=0.1,
        cond_drop_prob=0.1,
        level_drop_prob=0.2,
        run=RunConfig(2000, 16, 5.0, 1e-3),
        temperature=0.95,
        guidance_scale=3.0,
    ),
    fine=StageConfig(
        dim=96,
        depth=3,
        heads=2,
        dropout=0.1,
        cond_drop_prob=0.1,
        level_drop_prob=0.2,
        run=RunConfig(2000, 32, 2.0, 1e-3),
        temperature=0.4,
        guidance_scale=1.0,
    ),
    num_coarse_quantizers=2,
)

# One GPU, a day: MusicLM's rates with modules of a tenth of its size.
_SMALL = Preset(
    name="small",
    codec=CodecConfig(
        sample_hz=24000,
        hop_samples=480,
        dim=512,
        encoder_depth=8,
        decoder_depth=12,
        codebook_size=1024,
        num_quantizers=8,
        code_dim=16,
        run=RunConfig(200_000, 64, 2.0, 5e-4, warmup_steps=1000),
    ),
    semantic_tokenizer=SemanticConfig(
        dim=512, depth=12, heads=8, layer=8, num_clusters=1024,
        run=RunConfig(100_000, 64, 10.0, 5e-4, warmup_steps=2000),
    ),
    mulan=MuLaNConfig(
        dim=512,
        depth=8,
        heads=8,
        num_mels=128,
        n_fft=1024,
        text_vocab_size=8192,
        text_max_tokens=128,
        run=RunConfig(50_000, 1024, 10.0, 5e-4, warmup_steps=1000),
        patch_dropout=0.25,
        caption_dropout=0.2,
        chunk_size=128,
    ),
    quantizer=QuantizerConfig(num_quantizers=8, codebook_size=256),
    semantic=StageConfig(
        dim=768, depth=12, heads=12, dropout=0.1, cond_drop_prob=0.1, level_drop_prob=0.1,
        run=RunConfig(200_000, 64, 30.0, 3e-4, warmup_steps=2000),
        temperature=1.0,
        guidance_scale=3.0,
    ),
    coarse=StageConfig(
        dim=768, depth=12, heads=12, dropout=0.1, cond_drop_prob=0.1, level_drop_prob=0.1,
        run=RunConfig(200_000, 64, 10.0, 3e-4, warmup_steps=2000),
        temperature=0.95,
        guidance_scale=3.0,
    ),
    fine=StageConfig(
        dim=768, depth=12, heads=12, dropout=0.1, cond_drop_prob=0.1, level_drop_prob=0.1,
        run=RunConfig(200_000, 64, 3.0, 3e-4, warmup_steps=2000),
        temperature=0.4,
        guidance_scale=1.0,
    ),
    num_coarse_quantizers=4,
)  # fmt: skip

PRESETS = {preset.name: preset for preset in (_TINY, _SMALL)}


@beartype
def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: If there is none, naming those that exist.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
