"""Constructors of all exported modules refuse sizes of zero, negative sizes and wrong types."""

import inspect
from importlib.util import find_spec

import numpy as np
import pytest
from torch import nn

import audiolm_pytorch
import musiclm_pytorch
from audiolm_pytorch.nn.transformer import Transformer
from tests.helpers import small_models as small

MODELS = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
STAGE = {"num_semantic_tokens": 12, **MODELS}
# Arguments that build each exported module; modules of published weights have no sizes.
ARGUMENTS = {
    "SoundStream": {"codebook_dim": 16, "channels": 4, "strides": (2, 4), "codebook_size": 16, "rq_num_quantizers": 2},
    "BestRQEncoder": {**MODELS, "num_mels": 8, "n_fft": 256, "hop_length": 80},
    "SemanticTransformer": STAGE,
    "CoarseTransformer": {**STAGE, "codebook_size": 16, "num_coarse_quantizers": 2},
    "FineTransformer": {**MODELS, "codebook_size": 16, "num_coarse_quantizers": 2, "num_fine_quantizers": 2},
    "EntropyTransformer": {**MODELS, "codebook_size": 16, "num_quantizers": 2},
    "MusicGenTransformer": {**MODELS, "codebook_size": 16, "num_codebooks": 2, "num_groups": 1, "rate_hz": 50},
    "AudioSpectrogramTransformer": {**MODELS, "num_mels": 16, "spec_n_fft": 512},
    "TextTransformer": {**MODELS, "num_tokens": 256},
    "SpectralSoundStream": {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "hop_samples": 40, "code_dim": 4},
    "AudioLMSoundStream": {"codebook_dim": 16, "channels": 4, "codebook_size": 16},
    "MusicLMSoundStream": {"codebook_dim": 16, "channels": 4, "codebook_size": 16},
    "MuLaN": {"dim_latent": 8, "window_seconds": 1.0},
    "MuLaNEmbedQuantizer": {"conditioning_dims": (8,), "namespaces": ("coarse",), "rq_num_quantizers": 2},
}
BAD = [0, -1, float("nan"), "x", [], np.zeros(3), None]
# None and zero have a meaning for these arguments.
ALLOWED = {"depth", "encoder_depth", "decoder_depth", "spec_hop_length", "window_seconds"}


def constructor(name):
    """Return an exported class or function, with the modules that it needs."""
    package = audiolm_pytorch if name in audiolm_pytorch.__all__ else musiclm_pytorch
    build, parts = getattr(package, name), {}
    if name == "MuLaN":
        whole = small.small_mulan()
        parts = {"audio_transformer": whole.audio, "text_transformer": whole.text}
    if name == "MuLaNEmbedQuantizer":
        parts = {"mulan": small.small_mulan()}
    return build, parts


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
)
def test_wrong_sizes_are_refused(name, argument):
    """Nothing divides by zero, indexes an empty list, or builds a module without codes."""
    build, parts = constructor(name)
    arguments = {**ARGUMENTS[name], **parts}
    build(**arguments)
    for value in BAD:
        try:
            build(**{**arguments, argument: value})
        except (ValueError, TypeError) as error:
            assert str(error)
        else:
            assert value is None or argument in ALLOWED, f"{argument}={value!r} was accepted"


def test_all_exported_modules_are_listed_or_need_other_models():
    """A new exported module is added to `ARGUMENTS`."""
    wrappers = {"AudioLM", "MusicLM", "KMeansTokenizer", "TextConditioner", "TransformersTextEncoder", "ClapMuLaN"}
    wrappers |= {"DacWrapper", "EncodecWrapper", "MimiWrapper", "FairseqVQWav2Vec", "HubertWithKmeans"}
    wrappers |= {"Codec", "FrameEncoder", "JointEmbedding", "SemanticTokenizer"}
    wrappers |= {"MusicGen", "AudioGen"}  # of a codec
    wrappers |= {"TextTowerEncoder", "MelodyEmbedder"}  # of a tower of MuLaN
    wrappers |= {"SigmoidContrastiveLearning", "SoftmaxContrastiveLearning"}
    wrappers |= {f"{stage}TransformerWrapper" for stage in ("Semantic", "Coarse", "Fine")}
    for package in (audiolm_pytorch, musiclm_pytorch):
        exported = {name: getattr(package, name) for name in package.__all__}
        modules = {n for n, value in exported.items() if inspect.isclass(value) and issubclass(value, nn.Module)}
        assert modules <= ARGUMENTS.keys() | wrappers


def test_parts_of_an_audiolm_have_the_names_of_its_arguments():
    """Every part is found again under the name by which the constructor received it, as the same object."""
    parts = dict(small.small_stages())
    parts |= {"wav2vec": small.small_tokenizer(), "codec": small.small_soundstream()}
    parts["audio_conditioner"] = small.small_quantizer()
    audio_lm = audiolm_pytorch.AudioLM(**parts)
    musiclm = musiclm_pytorch.MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=parts["audio_conditioner"])
    assert all(getattr(audio_lm, name) is part for name, part in parts.items())
    assert musiclm.audio_lm is audio_lm and musiclm.mulan_embed_quantizer is parts["audio_conditioner"]


def test_parts_of_a_stage_wrapper_have_the_names_of_its_arguments():
    """The wrappers of a stage keep the stage, the tokenizers and the conditioner."""
    parts = {"transformer": small.small_stages()["coarse_transformer"], "wav2vec": small.small_tokenizer()}
    parts |= {"codec": small.small_soundstream(), "audio_conditioner": small.small_quantizer()}
    wrapper = audiolm_pytorch.CoarseTransformerWrapper(**parts)
    assert all(getattr(wrapper, name) is part for name, part in parts.items())


# Arguments that are no attributes, by class, and why.
NO_ATTRIBUTES = {
    # They define the class of the default quantizer, which a passed quantizer replaces.
    "SoundStream": {"use_lookup_free_quantizer", "use_finite_scalar_quantizer"},
}
# Attributes that already had the name, with another meaning: the linear heads of a stage, the channels of a codec's
# audio; and default values that depend on other arguments.
OTHER_VALUES = {"heads", "channels", "num_mels", "spec_n_fft", "layer", "rate_hz", "semantic_rate_hz"}


def built_modules():
    """An instance of each exported module that needs no published weights, with its arguments."""
    for name, arguments in ARGUMENTS.items():
        build, parts = constructor(name)
        if inspect.isclass(build):
            yield name, build(**arguments, **parts), {**arguments, **parts}
    musiclm = small.small_musiclm()
    for module in (musiclm, musiclm.audio_lm, musiclm.audio_lm.wav2vec):
        yield type(module).__name__, module, {}
    for loss in (musiclm_pytorch.SigmoidContrastiveLearning, musiclm_pytorch.SoftmaxContrastiveLearning):
        yield loss.__name__, loss(), {}
    yield "TextTokenizer", musiclm_pytorch.TextTokenizer(), {}
    sizes = {"dim": 16, "depth": 1, "heads": 1, "max_seconds": 1.0, "melody": True}
    yield "MusicGen", musiclm_pytorch.MusicGen(codec=small.small_soundstream(), **sizes), sizes
    tower = small.small_mulan().audio
    yield "MelodyEmbedder", musiclm_pytorch.MelodyEmbedder(audio_transformer=tower), {"audio_transformer": tower}
    yield "Transformer", Transformer(**MODELS, cross=True), {**MODELS, "cross": True}
    if find_spec("constriction") is not None:
        entropy = audiolm_pytorch.EntropyTransformer(**ARGUMENTS["EntropyTransformer"])
        yield "EntropyCoder", audiolm_pytorch.EntropyCoder(entropy), {"model": entropy}


def test_constructor_names_are_attributes():
    """Arguments of all exported classes are found under their names, with the values that were passed."""
    for name, module, arguments in built_modules():
        parameters = inspect.signature(type(module).__init__).parameters.values()
        names = {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
        missing = {each for each in (names | arguments.keys()) - {"self"} if not hasattr(module, each)}
        assert missing == NO_ATTRIBUTES.get(name, set()), name
        for argument, value in arguments.items():
            if argument not in missing | OTHER_VALUES and isinstance(value, int | float | str):
                assert getattr(module, argument) == value, (name, argument)
