import math
from dataclasses import FrozenInstanceError, replace

import pytest

from audiolm_pytorch.stages.wrappers import check_fit
from musiclm_pytorch import builders
from musiclm_pytorch.config import PRESETS, preset_named

LANGUAGE_MODELS = ("semantic", "coarse", "fine")
TRAINED = ("codec", "semantic_tokenizer", "mulan", *LANGUAGE_MODELS)
every_preset = pytest.mark.parametrize("name", list(PRESETS))


@every_preset
def test_preset_fits_together(name):
    """Sizes that constructors would refuse, or levels that nobody predicts, are found without training."""
    preset = preset_named(name)
    assert preset.name == name
    assert preset.codec.sample_hz % preset.codec.hop_samples == 0
    assert 0 < preset.num_coarse_quantizers < preset.codec.num_quantizers
    assert 1 <= preset.semantic_tokenizer.layer <= preset.semantic_tokenizer.depth
    assert preset.mulan.text_vocab_size >= 256
    for part in TRAINED[1:]:
        config = getattr(preset, part)
        assert config.dim % config.heads == 0
        assert config.run.precision in ("fp32", "bf16")
        assert config.run.warmup_steps < config.run.num_train_steps


@every_preset
def test_preset_can_be_built(name):
    """Every constructor takes the numbers of a preset, with one block instead of many, and the parts fit together."""
    preset = preset_named(name)
    shallow = {part: replace(getattr(preset, part), depth=1) for part in ("mulan", *LANGUAGE_MODELS)}
    preset = replace(preset, codec=replace(preset.codec, encoder_depth=1, decoder_depth=1), **shallow)
    preset = replace(preset, semantic_tokenizer=replace(preset.semantic_tokenizer, depth=1, layer=1))
    codec, encoder = builders.build_codec(preset), builders.build_semantic_encoder(preset)
    quantizer = builders.build_quantizer(preset, builders.build_mulan(preset, ["a tune", "a song"]), 10_000)
    for stage in LANGUAGE_MODELS:
        model = builders.build_language_model(preset, stage, preset.semantic_tokenizer.num_clusters)
        assert model.cond_dim == quantizer.dim(stage) and model.namespace == stage
        # without any condition the model reads as many null embeddings as a dropped condition leaves
        assert model.null_tokens == quantizer.num_quantizers
        check_fit(model, None, codec)
    assert encoder.sample_hz == 25 * encoder.downsample_factor
    assert quantizer.codebook_size == preset.quantizer.codebook_size


@every_preset
def test_scale_multiplies_step_counts_alone(name):
    """--scale makes a shorter run of the same model; the least has ten steps, and a warm-up of no more than a tenth."""
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
    assert preset.scaled(1.0) is preset


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_senseless_scale_is_refused(scale):
    """A scale that is no positive number would make no run."""
    with pytest.raises(ValueError, match="scale must be positive"):
        preset_named("tiny").scaled(scale)


def test_unknown_preset_names_those_there_are():
    """A typing error is answered with the choice."""
    with pytest.raises(ValueError, match="'tinny'.*tiny, small"):
        preset_named("tinny")


def test_presets_cannot_be_changed_in_place():
    """A run's preset stays what its folder says."""
    with pytest.raises(FrozenInstanceError):
        preset_named("tiny").codec.dim = 1  # type: ignore[misc]
