"""Presets: the sizes of all modules of a MusicLM, and the settings of their training."""

from dataclasses import dataclass, replace
from typing import Any

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.lm.task import StageObjective
from audiolm_pytorch.nn.module_state import check_positive, check_shares
from audiolm_pytorch.training.task import LoopSettings

__all__ = [
    "PRESETS",
    "CodecConfig",
    "ConvCodecConfig",
    "MelodyConfig",
    "MuLaNConfig",
    "Preset",
    "QuantizerConfig",
    "RunConfig",
    "SemanticConfig",
    "SpectralCodecConfig",
    "StageConfig",
    "TransformerConfig",
    "preset_named",
]

_MIN_STEPS = 10
_MAX_SCALE = 1e6


@typed
@dataclass(frozen=True)
class RunConfig:
    """Training settings of one model, where `seconds` is the crop length and `learning_rate` the peak learning rate.

    A step averages the gradients of `grad_accum_every` batches of `batch_size` crops. Checkpoints are written every two
    minutes, and also every `checkpoint_every_steps` steps. `LoopSettings` documents the other fields.
    """

    num_train_steps: int
    batch_size: int
    seconds: float
    learning_rate: float
    warmup_steps: int = 100
    precision: str = "bf16"
    grad_accum_every: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_blocks: bool = False
    compile: bool = False
    fsdp: bool = False
    sharded_checkpoints: bool = False

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        LoopSettings(**{name: value for name, value in vars(self).items() if name != "seconds"})
        if self.seconds <= 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")

    def scaled(self, scale: float) -> "RunConfig":
        """Copy the settings and multiply the number of training steps by `scale`; the result is at least 10 steps."""
        if not 0 < scale <= _MAX_SCALE:
            raise ValueError(
                f"scale must be positive and at most {_MAX_SCALE:g}, got {scale}; use 1 for the full number of steps"
            )
        if scale == 1:
            return self
        steps = max(_MIN_STEPS, round(self.num_train_steps * scale))
        return replace(self, num_train_steps=steps, warmup_steps=min(self.warmup_steps, max(1, steps // 10)))


@typed
@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Settings of a codec; an `adversarial` training has the discriminators of SoundStream, else only a mel loss."""

    sample_hz: int
    codebook_size: int
    num_quantizers: int
    run: RunConfig
    adversarial: bool = False


@typed
@dataclass(frozen=True, kw_only=True)
class SpectralCodecConfig(CodecConfig):
    """Settings of a `SpectralSoundStream`, whose layers run once per frame."""

    hop_samples: int
    dim: int
    encoder_depth: int
    decoder_depth: int
    code_dim: int


@typed
@dataclass(frozen=True, kw_only=True)
class ConvCodecConfig(CodecConfig):
    """Settings of a `SoundStream` with the causal convolutions of its paper; `channels` are those of the first one."""

    strides: tuple[int, ...]
    channels: int
    dim: int


@typed
@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and training settings of a transformer."""

    dim: int
    depth: int
    heads: int
    run: RunConfig

    def __post_init__(self) -> None:
        """Check the sizes, and the probabilities of subclasses."""
        check_shares(**{name: value for name, value in vars(self).items() if name.endswith(("_prob", "dropout"))})
        check_positive(dim=self.dim, depth=self.depth, heads=self.heads)
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={self.dim} and heads={self.heads}")

    @property
    def sizes(self) -> dict[str, Any]:
        """Sizes of the transformer as keyword arguments of its constructor."""
        return {"dim": self.dim, "depth": self.depth, "heads": self.heads, "dim_head": self.dim // self.heads}


@typed
@dataclass(frozen=True, kw_only=True)
class SemanticConfig(TransformerConfig):
    """Settings of a BEST-RQ encoder, and of the k-means clustering of the outputs of layer number `layer`."""

    layer: int
    num_clusters: int
    sample_hz: int = 16000
    token_hz: int = 25

    def __post_init__(self) -> None:
        """Check also that the encoder has the layer."""
        super().__post_init__()
        if not 1 <= self.layer <= self.depth:
            raise ValueError(f"layer must be from 1 to depth, got layer={self.layer} and depth={self.depth}")


@typed
@dataclass(frozen=True, kw_only=True)
class MuLaNConfig(TransformerConfig):
    """Settings of a MuLaN with two towers of equal size. The FFT length `n_fft` is in samples at 16 kHz.

    Training leaves out random audio patches (`patch_dropout`) and random phrases of captions (`caption_dropout`). A
    forward pass embeds `chunk_size` clips, or the whole batch with `chunk_size=None`.
    """

    num_mels: int
    n_fft: int
    text_vocab_size: int
    text_max_tokens: int
    patch_dropout: float = 0.0
    caption_dropout: float = 0.0
    chunk_size: int | None = None


@typed
@dataclass(frozen=True, kw_only=True)
class MelodyConfig(TransformerConfig):
    """Settings of a melody embedder, and of training the semantic and the coarse stage on with melodies.

    Lengths of the spectrogram are in samples at `sample_hz`; a patch has `patch_size` mel bands and frames. In the
    training of the stages with `stage_run`, the melody of an item is removed with probability `drop_prob`.
    """

    sample_hz: int
    num_mels: int
    n_fft: int
    hop_length: int
    patch_size: int
    dim_latent: int
    num_quantizers: int
    codebook_size: int
    drop_prob: float
    stage_run: RunConfig


@typed
@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Sizes of the quantizer of MuLaN embeddings; the MusicLM paper uses 12 levels of 1024 codes for a huge corpus."""

    num_quantizers: int
    codebook_size: int


@typed
@dataclass(frozen=True, kw_only=True)
class StageConfig(TransformerConfig):
    """Settings of the language model of one stage, with probabilities for training and defaults for generation.

    In training, the condition codes of an item are removed with probability `cond_drop_prob`. With probability
    `text_prob`, condition codes are computed from a caption instead of the recording. Only the coarse stage uses
    `semantic_lookahead_seconds` and `guide_semantic`.
    """

    dropout: float
    cond_drop_prob: float
    objective: StageObjective
    temperature: float = 1.0
    guidance_scale: float = 1.0
    text_prob: float = 0.0
    semantic_lookahead_seconds: float = 0.0
    guide_semantic: bool = False


# The embedder is trained in about ten minutes on one core.
_MELODY = MelodyConfig(
    dim=128, depth=3, heads=4, sample_hz=8000, num_mels=160, n_fft=1024, hop_length=256, patch_size=20, dim_latent=64,
    num_quantizers=8, codebook_size=256, run=RunConfig(1500, 16, 5.0, 1e-3, precision="fp32"),
    drop_prob=0.4, stage_run=RunConfig(1500, 16, 5.0, 5e-4),
)  # fmt: skip


@typed
@dataclass(frozen=True, kw_only=True)
class Preset:
    """All settings of a MusicLM. The coarse stage predicts the first `num_coarse_quantizers` levels of the codec."""

    name: str
    codec: CodecConfig
    semantic_tokenizer: SemanticConfig
    mulan: MuLaNConfig
    quantizer: QuantizerConfig
    semantic: StageConfig
    coarse: StageConfig
    fine: StageConfig
    num_coarse_quantizers: int
    melody: MelodyConfig = _MELODY

    def __post_init__(self) -> None:
        """Check that the fine stage has levels to predict."""
        if not 1 <= self.num_coarse_quantizers < self.codec.num_quantizers:
            raise ValueError(
                f"num_coarse_quantizers must be at least 1 and below codec.num_quantizers={self.codec.num_quantizers}, "
                f"got {self.num_coarse_quantizers}"
            )

    def scaled(self, scale: float) -> "Preset":
        """Copy the preset and multiply every number of training steps by `scale`; each result is at least 10 steps."""
        parts = {}
        for name, part in vars(self).items():
            runs = [key for key in ("run", "stage_run") if hasattr(part, key)]
            if runs:
                parts[name] = replace(part, **{key: getattr(part, key).scaled(scale) for key in runs})
        return replace(self, **parts)


_TINY_STAGE = StageConfig(
    dim=256, depth=6, heads=4, dropout=0.05, cond_drop_prob=0.1, guidance_scale=3.0,
    objective=StageObjective(level_drop_prob=0.2), run=RunConfig(4000, 16, 5.0, 1e-3),
)  # fmt: skip
# For two CPU cores: about two hours, at most 50 MB as fp16. recipes/README.md lists the trials behind it.
_TINY = Preset(
    name="tiny",
    codec=SpectralCodecConfig(
        sample_hz=16000, hop_samples=320, dim=256, encoder_depth=4, decoder_depth=6,
        codebook_size=1024, num_quantizers=4, code_dim=16, run=RunConfig(6000, 16, 1.0, 1e-3),
    ),
    semantic_tokenizer=SemanticConfig(
        dim=192, depth=4, heads=3, layer=3, num_clusters=512, run=RunConfig(1200, 16, 5.0, 1e-3)
    ),
    mulan=MuLaNConfig(
        dim=256, depth=4, heads=4, num_mels=64, n_fft=1024, text_vocab_size=2048, text_max_tokens=96,
        patch_dropout=0.25, caption_dropout=0.1, run=RunConfig(1200, 64, 5.0, 7e-4),
    ),
    quantizer=QuantizerConfig(num_quantizers=12, codebook_size=16),
    semantic=_TINY_STAGE,
    coarse=replace(
        _TINY_STAGE, dim=192, heads=3, run=RunConfig(3000, 16, 5.0, 1e-3), temperature=0.95, guidance_scale=1.5,
        objective=StageObjective(level_drop_prob=0.2, history_noise=0.6),
        semantic_lookahead_seconds=0.32, guide_semantic=True,
    ),
    fine=replace(
        _TINY_STAGE, dim=96, depth=3, heads=2, run=RunConfig(2000, 32, 2.0, 1e-3), temperature=0.4, guidance_scale=1.0,
        objective=StageObjective(level_drop_prob=0.2, history_noise=0.6, input_noise=0.2),
    ),
    num_coarse_quantizers=2,
)  # fmt: skip

_SMALL_RUN = RunConfig(200_000, 64, 30.0, 3e-4, warmup_steps=2000)
_SMALL_STAGE = StageConfig(
    dim=768, depth=12, heads=12, dropout=0.1, cond_drop_prob=0.1, guidance_scale=3.0,
    objective=StageObjective(level_drop_prob=0.1), run=_SMALL_RUN,
)  # fmt: skip
# For one GPU: about three days of an A100 by --dry-run-device. MusicLM's rates, with models of a quarter of its size.
_SMALL = Preset(
    name="small",
    codec=SpectralCodecConfig(
        sample_hz=24000, hop_samples=480, dim=512, encoder_depth=8, decoder_depth=12,
        codebook_size=1024, num_quantizers=8, code_dim=16, adversarial=True,
        run=RunConfig(200_000, 64, 2.0, 5e-4, warmup_steps=1000),
    ),
    semantic_tokenizer=SemanticConfig(
        dim=512, depth=12, heads=8, layer=8, num_clusters=1024,
        run=RunConfig(100_000, 64, 10.0, 5e-4, warmup_steps=2000),
    ),
    mulan=MuLaNConfig(
        dim=512, depth=8, heads=8, num_mels=128, n_fft=1024, text_vocab_size=8192, text_max_tokens=128,
        patch_dropout=0.25, caption_dropout=0.2, chunk_size=128,
        run=RunConfig(50_000, 1024, 10.0, 5e-4, warmup_steps=1000),
    ),
    quantizer=QuantizerConfig(num_quantizers=8, codebook_size=256),
    semantic=_SMALL_STAGE,
    coarse=replace(_SMALL_STAGE, run=replace(_SMALL_RUN, seconds=10.0), temperature=0.95),
    fine=replace(_SMALL_STAGE, run=replace(_SMALL_RUN, seconds=3.0), temperature=0.4, guidance_scale=1.0),
    num_coarse_quantizers=4,
)  # fmt: skip

# A step has 256 crops, as in AudioLM (arXiv:2209.03143, section IV-B). With 16 processes, use grad_accum_every=1.
_PAPER_RUN = RunConfig(1_000_000, 16, 30.0, 3e-4, warmup_steps=10_000, grad_accum_every=16)
_PAPER_STAGE = StageConfig(
    dim=1024, depth=24, heads=16, dropout=0.1, cond_drop_prob=0.1, guidance_scale=3.0,
    objective=StageObjective(level_drop_prob=0.1), run=_PAPER_RUN,
)  # fmt: skip
# The sizes, rates, crops and temperatures of MusicLM (arXiv:2301.11325, section 4). Its learning rates and numbers of
# steps are not published. The towers of MuLaN have the sizes of AST and BERT-base (arXiv:2208.12415); the semantic
# encoder has the parameters of w2v-BERT XL in transformer blocks. The codec has the run of EnCodec (arXiv:2210.13438).
_PAPER = Preset(
    name="paper",
    codec=ConvCodecConfig(
        sample_hz=24000, strides=(3, 4, 5, 8), channels=32, dim=512, codebook_size=1024, num_quantizers=12,
        adversarial=True, run=RunConfig(600_000, 64, 1.0, 3e-4, warmup_steps=1000),
    ),
    semantic_tokenizer=SemanticConfig(
        dim=1408, depth=25, heads=22, layer=7, num_clusters=1024,
        run=RunConfig(400_000, 16, 10.0, 3e-4, warmup_steps=10_000, grad_accum_every=16),
    ),
    mulan=MuLaNConfig(
        dim=768, depth=12, heads=12, num_mels=128, n_fft=1024, text_vocab_size=30_522, text_max_tokens=512,
        patch_dropout=0.25, caption_dropout=0.2, chunk_size=128,
        run=RunConfig(100_000, 6144, 10.0, 3e-4, warmup_steps=5000),
    ),
    quantizer=QuantizerConfig(num_quantizers=12, codebook_size=1024),
    semantic=_PAPER_STAGE,
    coarse=replace(_PAPER_STAGE, run=replace(_PAPER_RUN, seconds=10.0), temperature=0.95),
    fine=replace(_PAPER_STAGE, run=replace(_PAPER_RUN, seconds=3.0), temperature=0.4, guidance_scale=1.0),
    num_coarse_quantizers=4,
)  # fmt: skip


def _fine_tuning(name: str, **runs: tuple[int, float]) -> Preset:
    """Return settings to train a model further on few captioned files, with steps and learning rates of the stages."""
    stages = {
        stage: replace(
            getattr(_TINY, stage),
            run=RunConfig(steps, 10, 5.0, rate, warmup_steps=10),
            objective=StageObjective(),
            text_prob=0.9,
        )
        for stage, (steps, rate) in runs.items()
    }
    parts = {}
    for part, rate in (("codec", 1e-4), ("semantic_tokenizer", 1e-4), ("mulan", 5e-5)):
        config = getattr(_TINY, part)
        parts[part] = replace(config, run=replace(config.run, num_train_steps=200, learning_rate=rate))
    return replace(_TINY, name=name, **stages, **parts)


# The second is for LoRA, whose updates need larger rates. recipes/README.md has results of both.
_FINE_TUNING = (
    _fine_tuning("finetune", semantic=(80, 3e-4), coarse=(120, 5e-4), fine=(80, 3e-4)),
    _fine_tuning("lora", semantic=(120, 7e-4), coarse=(240, 1e-3), fine=(120, 1e-3)),
)

PRESETS = {preset.name: preset for preset in (_TINY, _SMALL, _PAPER, *_FINE_TUNING)}


@typed
def preset_named(name: str) -> Preset:
    """Return the preset with this name; raise a ValueError with all preset names for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]
