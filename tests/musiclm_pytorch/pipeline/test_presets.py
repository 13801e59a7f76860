import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from audiolm_pytorch.lm.compatibility import check_compatible
from audiolm_pytorch.lm.tokenizing import tokenize
from audiolm_pytorch.semantic import BestRQ, BestRQEncoder, SemanticTokenizerTrainer
from musiclm_pytorch.pipeline import builders
from musiclm_pytorch.pipeline.estimate import estimate_steps
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.presets import PRESETS, Preset, SpectralCodecConfig, preset_named
from musiclm_pytorch.pipeline.steps import STEPS
from tests.helpers.micro import MICRO

STAGES = ("semantic", "coarse", "fine")
TRAINED = ("codec", "semantic_tokenizer", "mulan", *STAGES)
every_preset = pytest.mark.parametrize("name", list(PRESETS))


def shallow(preset: Preset, depth: int) -> Preset:
    """A preset with transformers, and a spectral codec, of few layers."""
    parts = {part: replace(getattr(preset, part), depth=depth) for part in ("mulan", *STAGES)}
    parts["semantic_tokenizer"] = replace(preset.semantic_tokenizer, depth=depth, layer=depth)
    if isinstance(preset.codec, SpectralCodecConfig):
        parts["codec"] = replace(preset.codec, encoder_depth=depth, decoder_depth=depth)
    return replace(preset, **parts)


@every_preset
def test_preset_is_consistent(name):
    """The sizes of a preset are consistent."""
    preset = preset_named(name)
    assert preset.name == name
    assert 0 < preset.codec.num_quantizers
    assert 0 < preset.num_coarse_quantizers < preset.codec.num_quantizers
    assert 1 <= preset.semantic_tokenizer.layer <= preset.semantic_tokenizer.depth
    assert preset.mulan.text_vocab_size >= 256
    for part in TRAINED[1:]:
        config = getattr(preset, part)
        assert config.dim % config.heads == 0
        assert config.run.precision in ("fp32", "bf16")
        assert config.run.warmup_steps < config.run.num_train_steps


@pytest.mark.slow
@every_preset
def test_preset_can_be_built(name):
    """All modules of a preset can be built, and they are compatible."""
    preset = preset_named(name)
    preset = shallow(preset, 1)
    codec, tokenizer = builders.build_codec(preset), builders.build_semantic_tokenizer(preset)
    encoder = tokenizer.encoder
    quantizer = builders.build_quantizer(preset, builders.build_mulan(preset, ["a tune", "a song"]), 10_000)
    for stage in STAGES:
        model = builders.build_stage(preset, stage, codec=codec, tokenizer=tokenizer)
        assert model.cond_dim == quantizer.dim(stage) and model.namespace == stage
        # without any condition the model reads as many null embeddings as a dropped condition leaves
        assert model.null_tokens == quantizer.num_quantizers
        check_compatible(model, tokenizer, codec)
    s = preset.semantic_tokenizer
    assert encoder.sample_hz == s.sample_hz == s.token_hz * encoder.downsample_factor
    assert quantizer.codebook_size == preset.quantizer.codebook_size


@pytest.mark.slow
@every_preset
def test_presets_keep_the_defaults_of_best_rq(name):
    """With the default rates, the encoder and its training have the default settings of BEST-RQ."""
    preset = preset_named(name)
    preset = shallow(preset, 1)
    s = preset.semantic_tokenizer
    codec, tokenizer = builders.build_codec(preset), builders.build_semantic_tokenizer(preset)
    encoder = builders.build_semantic_encoder(preset)
    default = BestRQEncoder(dim=s.dim, depth=s.depth, heads=s.heads, dim_head=s.dim // s.heads)
    assert encoder.config == default.config
    objective, plain = builders.build_semantic_objective(encoder), BestRQ(default)
    assert (objective.start_prob, objective.span_tokens) == (plain.start_prob, plain.span_tokens)
    parts = {"codec": codec, "tokenizer": tokenizer}
    stages = {stage: builders.build_stage(preset, stage, **parts).config for stage in ("semantic", "coarse")}
    assert stages["semantic"]["rate_hz"] == stages["coarse"]["semantic_rate_hz"] == "25"


def semantic_preset(sample_hz: int, token_hz: int) -> Preset:
    """The micro preset with other semantic tokens."""
    return replace(MICRO, semantic_tokenizer=replace(MICRO.semantic_tokenizer, sample_hz=sample_hz, token_hz=token_hz))


every_rate = pytest.mark.parametrize(("sample_hz", "token_hz"), [(16000, 25), (16000, 50), (24000, 25), (24000, 50)])


@pytest.mark.slow
@every_rate
def test_semantic_tokens_have_the_rate_of_the_preset(sample_hz, token_hz):
    """200 random lengths have exactly `num_frames` tokens, alone and in a batch."""
    tokenizer = builders.build_semantic_tokenizer(semantic_preset(sample_hz, token_hz))
    encoder = tokenizer.encoder
    assert (tokenizer.target_sample_hz, tokenizer.downsample_factor * token_hz) == (sample_hz, sample_hz)
    assert tokenizer.num_frames(10 * sample_hz) == 10 * token_hz
    assert encoder.front_end.hop_length * 100 == sample_hz and encoder.front_end.n_fft / sample_hz == 0.064
    assert (encoder.window_tokens, encoder.context_tokens) == (6 * token_hz, token_hz)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(tokenizer.downsample_factor, sample_hz // 4, (200,), generator=generator)
    waves = torch.randn(200, sample_hz // 4, generator=generator)
    together = tokenizer(waves, lengths=lengths)
    for wave, length, in_batch in zip(waves, lengths.tolist(), together):
        alone = tokenizer(wave[None, :length])[0]
        assert len(alone) == tokenizer.num_frames(length) == math.ceil(length * token_hz / sample_hz)
        assert torch.equal(in_batch[: len(alone)], alone) and (in_batch[len(alone) :] == -1).all()


@pytest.mark.slow
@every_rate
def test_semantic_encoder_of_every_rate_trains(sample_hz, token_hz, micro_data, tmp_path):
    """The encoder trains at every rate, with masked spans of 160 ms and the same share of masked audio."""
    preset = semantic_preset(sample_hz, token_hz)
    encoder = builders.build_semantic_encoder(preset)
    objective = builders.build_semantic_objective(encoder)
    assert objective.span_tokens / token_hz == 0.16
    run = {"batch_size": 4, "num_train_steps": 2, "warmup_steps": 1, "seconds": 1.0, "results_folder": tmp_path}
    trainer = SemanticTokenizerTrainer(encoder=encoder, objective=objective, folder=micro_data, **run)
    before = encoder.to_tokens.weight.detach().clone()
    result = trainer.train()
    assert result.step == 2 and math.isfinite(result.metrics["valid.loss"])
    assert not torch.equal(encoder.to_tokens.weight, before)
    hidden = objective(torch.randn(16, 5 * sample_hz), generator=torch.Generator().manual_seed(0)).hidden
    # the share of sound under spans that start 3.75 times a second and last 160 ms: 1 - (1 - 0.15)^4 at 25 Hz
    assert float(hidden.float().mean()) == pytest.approx(0.47, abs=0.05)


@every_rate
def test_stages_are_compatible_with_tokens_of_every_rate(sample_hz, token_hz):
    """The stages accept a second of the tokens of their preset, and no tokens of another rate."""
    preset = semantic_preset(sample_hz, token_hz)
    tokenizer, codec = builders.build_semantic_tokenizer(preset), builders.build_codec(preset)
    num_samples = {"semantic": sample_hz, "acoustic": preset.codec.sample_hz}
    waves = {kind: torch.randn(2, count) for kind, count in num_samples.items()}
    lengths = {kind: torch.full((2,), count) for kind, count in num_samples.items()}
    tokens = tokenize(waves, lengths, tokenizer, codec)
    parts = {"codec": codec, "tokenizer": tokenizer}
    stages = {stage: builders.build_stage(preset, stage, **parts) for stage in STAGES}
    for stage, model in stages.items():
        check_compatible(model, tokenizer, codec)
        rates_hz = {stream.name: stream.rate_hz for stream in model.layout.streams}
        assert rates_hz.get("semantic", token_hz) == token_hz
        packed = model.packed(tokens)
        assert packed.loss_mask.sum() == {"semantic": 2 * token_hz, "coarse": 2 * 50, "fine": 2 * 50 * 2}[stage]
        assert model(packed).loss.isfinite()
    other = builders.build_semantic_tokenizer(semantic_preset(sample_hz, 75 - token_hz))
    with pytest.raises(ValueError, match="with the rates of the tokenizers"):
        check_compatible(stages["coarse"], other, codec)


def test_stages_have_the_rates_of_the_parts():
    """Vocabularies and rates are those of the codec and the tokenizer, the number of levels is that of the preset."""
    others = replace(
        semantic_preset(24000, 50), codec=replace(MICRO.codec, hop_samples=400, codebook_size=20, num_quantizers=5)
    )
    codec, tokenizer = builders.build_codec(others), builders.build_semantic_tokenizer(others)
    stages = {stage: builders.build_stage(MICRO, stage, codec=codec, tokenizer=tokenizer).config for stage in STAGES}
    assert stages["semantic"]["rate_hz"] == stages["coarse"]["semantic_rate_hz"] == "50"
    assert stages["coarse"]["rate_hz"] == stages["fine"]["rate_hz"] == "40"
    assert stages["coarse"]["codebook_size"] == stages["fine"]["codebook_size"] == 20
    assert (stages["coarse"]["num_coarse_quantizers"], stages["fine"]["num_fine_quantizers"]) == (1, 2)
    with pytest.raises(ValueError, match="the codec has 3 levels, but the preset .* needs 5; pass a codec with more"):
        builders.build_stage(others, "fine", codec=builders.build_codec(MICRO), tokenizer=tokenizer)


@pytest.mark.parametrize(("sample_hz", "token_hz"), [(22050, 25), (16000, 30), (16000, 0)])
def test_inexact_rates_are_refused(sample_hz, token_hz):
    """Rates are never rounded, because tokens would drift against the frames of the codec."""
    with pytest.raises(ValueError, match="not a whole number|not a multiple|at least 1"):
        builders.build_semantic_encoder(semantic_preset(sample_hz, token_hz))


@every_preset
def test_scale_multiplies_step_counts_only(name):
    """A scaled preset has the same sizes, at least ten steps, and a warm-up of at most a tenth of them."""
    preset = preset_named(name)
    half, hundredth, none = preset.scaled(0.5), preset.scaled(0.01), preset.scaled(1e-9)
    for part in TRAINED:
        full = getattr(preset, part).run
        assert getattr(half, part).run.num_train_steps == round(full.num_train_steps / 2)
        assert getattr(none, part).run.num_train_steps == 10
        shorter = getattr(hundredth, part).run
        assert 1 <= shorter.warmup_steps <= max(1, shorter.num_train_steps // 10)
        assert shorter.learning_rate == full.learning_rate
    assert half.codec.dim == preset.codec.dim and half.quantizer == preset.quantizer
    assert preset.scaled(1.0) == preset


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_invalid_scale_is_refused(scale):
    """A scale must be a positive number."""
    with pytest.raises(ValueError, match="scale must be (positive|a number)"):
        preset_named("tiny").scaled(scale)


def test_unknown_preset_lists_the_presets():
    """The error message lists the presets."""
    with pytest.raises(ValueError, match="'tinny'.*tiny, small, paper"):
        preset_named("tinny")


def test_presets_cannot_be_changed_in_place():
    """Presets are frozen."""
    with pytest.raises(FrozenInstanceError):
        preset_named("tiny").codec.dim = 1  # type: ignore[misc]


@pytest.mark.slow
def test_paper_has_the_published_numbers_of_parameters():
    """MusicLM's stages have 430 M, w2v-BERT XL 0.6 B, BERT-base 110 M, and ViT-B, of which AST is made, 86 M."""
    preset = preset_named("paper")
    tokenizer = builders.build_semantic_tokenizer(shallow(preset, 1))
    with torch.device("meta"):
        codec, encoder = builders.build_codec(preset), builders.build_semantic_encoder(preset)
        mulan = builders.build_mulan(preset, ["a tune", "a song"])
        quantizer = builders.build_quantizer(preset, mulan, 100_000)
        stages = {stage: builders.build_stage(preset, stage, codec=codec, tokenizer=tokenizer) for stage in STAGES}

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(encoder) == pytest.approx(600e6, rel=0.02)
    assert count(mulan.audio_transformer) == pytest.approx(86e6, rel=0.02)
    # the vocabulary of two captions is small
    text = mulan.text_transformer
    missing_rows = preset.mulan.text_vocab_size - text.num_tokens
    assert count(text) + missing_rows * text.dim == pytest.approx(110e6, rel=0.02)
    counts = {stage: count(model, quantizer.table(stage)) for stage, model in stages.items()}
    assert counts["coarse"] == pytest.approx(430e6, rel=0.02) and counts["fine"] == pytest.approx(430e6, rel=0.02)
    # no head predicts the 12 x 1024 condition codes, which are never predicted
    unused_head = quantizer.num_quantizers * quantizer.codebook_size * preset.semantic.dim
    assert counts["semantic"] + unused_head == pytest.approx(430e6, rel=0.02)
    assert (codec.target_sample_hz, codec.downsample_factor, codec.num_quantizers) == (24000, 480, 12)


@pytest.mark.slow
def test_every_model_of_paper_trains_with_two_layers(micro_data, tmp_path):
    """A step of every model at the widths of the preset, adversarial codec included, as a dry run measures it."""
    pipeline = Pipeline(shallow(preset_named("paper"), 2), data=micro_data, out=tmp_path / "run")
    rows = estimate_steps(pipeline)
    assert [row.step for row in rows] == list(STEPS)
    assert all(row.seconds > 0 and row.num_parameters > 10e6 for row in rows if row.step not in ("quantizer", "tokens"))
