"""Every module computes with weights of half and double precision, from waves and texts of the usual types."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import audiolm_pytorch
import musiclm_pytorch
from audiolm_pytorch import DacWrapper, EncodecWrapper, FairseqVQWav2Vec, MimiWrapper, TextConditioner
from audiolm_pytorch.codecs.channelwise import ChannelwiseCodec
from audiolm_pytorch.codecs.discriminators import encodec_discriminators, soundstream_discriminators
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.lm.stage_transformer import AudioTokens
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder
from musiclm_pytorch import (
    MusicGen,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
    TextTokenizer,
    TextTransformer,
    TransformersTextEncoder,
)
from musiclm_pytorch.evaluation.classifier import AttributeClassifier
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.evaluation.musicnn import MusicNN
from musiclm_pytorch.mulan import ClapMuLaN
from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder
from musiclm_pytorch.musicgen.transformer import MusicGenTransformer
from tests.helpers import small_models as small
from tests.helpers.published_vq_wav2vec import vq_settings, write_vq_wav2vec
from tests.helpers.toy_musiclm import toy_embedder

transformers = pytest.importorskip("transformers")
every_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float64))],
    ids=str,
)
WAVE = 0.1 * torch.sin(torch.arange(2 * 4000).float()).view(2, 4000)

LATENTS = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
# Registered classes whose instances the tests of codecs, towers and MusicLM use, and the base of the stages.
USED_ELSEWHERE = [
    *("SoundStream", "ConvEncoder", "ConvDecoder", "SpectralEncoder", "SpectralDecoder", "TokenTransformer"),
    *("ResidualQuantizer", "GroupedQuantizer", "ResidualLookupFreeQuantizer", "ResidualFiniteScalarQuantizer"),
    *("MuLaN", "AudioSpectrogramTransformer", "TextTransformer", "MuLaNEmbedQuantizer"),
    *("KMeansTokenizer", "BestRQEncoder", "HubertWithKmeans"),
    *("MultiScaleWaveDiscriminator", "ComplexSTFTDiscriminator"),
]


def codec_outputs(codec):
    """Tokens, their wave, the wave of `forward`, and the wave without quantization."""
    codes = codec.tokenize(WAVE)
    waves = [codec(WAVE).wave, codec(WAVE, return_recons_only=True), codec(WAVE, quantize=False).wave]
    return [codes, codec.decode_from_codebook_indices(codes), *waves]


CODECS = {
    "causal": lambda: small.small_soundstream(),
    "attention": lambda: small.small_soundstream(attn_depth=1, attn_window_size=8),
    "groups": lambda: small.small_soundstream(rq_groups=2),
    "denoising": lambda: small.small_soundstream(denoising=FiLM(dim=16)),
    "lookup-free": lambda: small.small_soundstream(use_lookup_free_quantizer=True),
    "finite scalar": lambda: small.small_soundstream(use_finite_scalar_quantizer=True, codebook_size=64),
    "spectral": lambda: small.small_spectral_codec().eval(),
}


@every_dtype
@pytest.mark.parametrize("kind", CODECS)
def test_codecs(kind, dtype):
    """Encoder, quantizers of every kind and decoder."""
    for output in codec_outputs(CODECS[kind]().to(dtype)):
        assert output.isfinite().all()


def stage_loss(stage):
    """Loss of a stage with all streams and conditions, and gradients of its weights."""
    tokens = {"semantic": torch.randint(12, (2, 8)), "acoustic": torch.randint(16, (2, 16, 3))}
    codes = ConditionTensor(torch.randn(2, 2, 16), torch.ones(2, 2, dtype=torch.bool))
    loss = stage(stage.packed(AudioTokens({kind: tokens[kind] for kind in stage.kinds}, {})), {"codes": codes}).loss
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in stage.parameters() if weight.grad is not None)]


def discriminated(discriminators):
    """Logits of waves, and their gradients."""
    wave = WAVE[:, None, :400].clone().requires_grad_()
    logits = [output.logits for output in discriminators(wave)]
    sum(each.float().sum() for each in logits).backward()
    return [*logits, wave.grad]


def musicgen_loss(transformer):
    """Loss of a language model of all levels that reads the states of texts."""
    text = ConditionTensor(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    packed = transformer.packed(AudioTokens({"acoustic": torch.randint(16, (2, 10, 3))}, {}))
    return [transformer(packed, {"text": text}).loss]


def loaded(model):
    """A model of transformers in memory."""
    return LoadedModel(model.eval())


def encodec():
    """A small EnCodec."""
    sizes = {"sampling_rate": 8000, "num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2]}
    sizes |= {"num_lstm_layers": 1, "codebook_size": 1024, "target_bandwidths": [20.0]}
    return EncodecWrapper(loaded(transformers.EncodecModel(transformers.EncodecConfig(**sizes))))


def dac():
    """A small DAC."""
    sizes = {"sampling_rate": 8000, "encoder_hidden_size": 4, "downsampling_ratios": [2, 5], "codebook_dim": 4}
    sizes |= {"n_codebooks": 4, "codebook_size": 16, "decoder_hidden_size": 16}
    return DacWrapper(loaded(transformers.DacModel(transformers.DacConfig(**sizes))))


def mimi():
    """A small Mimi."""
    sizes = {"sampling_rate": 8000, "num_filters": 2, "hidden_size": 16, "upsampling_ratios": [4, 2]}
    sizes |= {"codebook_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4}
    sizes |= {"upsample_groups": 16, "num_hidden_layers": 2, "intermediate_size": 16, "sliding_window": 5}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    return MimiWrapper(loaded(transformers.MimiModel(transformers.MimiConfig(**sizes))))


def hubert():
    """A small HuBERT."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convs = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return TransformersEncoder(loaded(transformers.HubertModel(transformers.HubertConfig(**sizes, **convs))))


def clap():
    """A small CLAP."""
    text = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "max_position_embeddings": 42}
    audio = {"patch_embeds_hidden_size": 8, "hidden_size": 32, "depths": [1, 1, 1], "num_attention_heads": [2, 2, 4]}
    config = transformers.ClapConfig(text_config=text, audio_config=audio | {"num_hidden_layers": 3}, projection_dim=12)
    preprocessor = transformers.ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc").to_dict()
    model = LoadedModel(transformers.ClapModel(config).eval(), preprocessor=preprocessor)
    return ClapMuLaN(model, tokenizer=TextTokenizer())


def vq_wav2vec():
    """A small vq-wav2vec."""
    with TemporaryDirectory() as folder:
        write_vq_wav2vec(Path(folder) / "x.pt", vq_settings())
        return FairseqVQWav2Vec(Path(folder) / "x.pt")


def fitted_on(waves):
    """A classifier of two clips."""
    features = ClipFeatures()
    return AttributeClassifier.fit(features(waves), {"mood": ["calm", "sad"]}, features)


def bert():
    """A small BERT."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return loaded(transformers.BertModel(transformers.BertConfig(vocab_size=256, **sizes)))


# How to build and use a module of each registered class that the tests below do not use.
MODULES = {
    "FiLM": (lambda: FiLM(dim=16), lambda film: [film(torch.randn(2, 5, 16), torch.tensor([True, False]))]),
    "SemanticTransformer": (lambda: small.small_stages()["semantic_transformer"], stage_loss),
    "CoarseTransformer": (lambda: small.small_stages()["coarse_transformer"], stage_loss),
    "FineTransformer": (lambda: small.small_stages()["fine_transformer"], stage_loss),
    "EntropyTransformer": (
        lambda: EntropyTransformer(dim=16, depth=1, heads=2, codebook_size=16, num_quantizers=3),
        lambda model: [model(model.packed(AudioTokens({"acoustic": torch.randint(16, (2, 10, 3))}, {}))).loss],
    ),
    "MusicGenTransformer": (
        lambda: MusicGenTransformer(
            dim=16, depth=1, heads=2, dim_head=8, codebook_size=16, num_codebooks=3, text_dim=8
        ),
        musicgen_loss,
    ),
    "ChannelwiseCodec": (
        lambda: ChannelwiseCodec(codec=small.small_soundstream(), channels=2),
        lambda codec: [codec.decode_from_codebook_indices(codec.tokenize(WAVE.view(1, 2, -1)))],
    ),
    "MelodyEmbedder": (toy_embedder, lambda embedder: [*embedder.latents(WAVE)]),
    "Discriminators": (lambda: soundstream_discriminators(width=8), discriminated),
    "MultiScaleSTFTDiscriminator": (lambda: encodec_discriminators(width=4), discriminated),
    "MusicNN": (lambda: MusicNN(tags=["a", "b"]).eval(), lambda network: [*network.window_features(WAVE)]),
    "SoftmaxContrastiveLearning": (SoftmaxContrastiveLearning, lambda loss: [loss(*LATENTS)]),
    "SigmoidContrastiveLearning": (SigmoidContrastiveLearning, lambda loss: [loss(*LATENTS)]),
    "AttributeClassifier": (
        lambda: fitted_on(torch.randn(2, 3 * 16_000)),
        lambda classifier: classifier.predict_proba(WAVE.repeat(1, 12), 16_000).values(),
    ),
    "ClapMuLaN": (
        clap,
        lambda mulan: [mulan.get_audio_latents(WAVE.repeat(1, 12)), mulan.get_text_latents(["a low tone", "b"])],
    ),
    "FairseqVQWav2Vec": (vq_wav2vec, lambda tokenizer: [tokenizer(WAVE.repeat(1, 4))]),
    "EncodecWrapper": (encodec, lambda codec: [codec.decode_from_codebook_indices(codec.tokenize(WAVE))]),
    "DacWrapper": (dac, lambda codec: [codec.decode_from_codebook_indices(codec.tokenize(WAVE))]),
    "MimiWrapper": (mimi, lambda codec: [codec.decode_from_codebook_indices(codec.tokenize(WAVE))]),
    "TransformersEncoder": (hubert, lambda encoder: [encoder.features(WAVE)[0]]),
    "TextConditioner": (
        lambda: TextConditioner(bert(), tokenizer=TextTokenizer()),
        lambda encoder: [encoder(["a low tone", "b"]).embeddings],
    ),
    "TextTowerEncoder": (
        lambda: TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=2, dim_head=8)),
        lambda encoder: [encoder(["a low tone", "b"]).embeddings],
    ),
    "TransformersTextEncoder": (
        lambda: TransformersTextEncoder(bert(), tokenizer=TextTokenizer()),
        lambda encoder: [encoder(["a low tone", "b"])],
    ),
}

LARGE = ("MusicNN", "ClapMuLaN", "AttributeClassifier")


@every_dtype
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in MODULES]
)
def test_registered_modules(name, dtype):
    """Modules of registered classes compute finite values from float32 inputs."""
    torch.manual_seed(0)
    build, call = MODULES[name]
    for output in call(build().to(dtype)):
        assert output.isfinite().all()


def test_all_registered_classes_are_tested():
    """A new registered class is added to `MODULES`."""
    files = [file for package in (audiolm_pytorch, musiclm_pytorch) for file in Path(package.__path__[0]).rglob("*.py")]
    texts = [file.read_text() for file in files]
    registered = {name for text in texts for name in re.findall(r"^@register\nclass (\w+)", text, re.MULTILINE)}
    assert registered == MODULES.keys() | set(USED_ELSEWHERE)


@every_dtype
def test_towers_quantizer_and_tokenizer(dtype):
    """MuLaN and its loss, the codes of waves and texts, semantic tokens."""
    mulan, tokenizer = small.small_mulan().to(dtype), small.small_tokenizer().to(dtype)
    quantizer = small.small_quantizer().to(dtype)
    mulan(WAVE, ["a low tone", "a high tone"]).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in mulan.parameters())
    assert mulan.get_long_audio_latents(WAVE.repeat(1, 3)).isfinite().all()
    assert quantizer.codes(wavs=WAVE).shape == quantizer.codes(texts=["a", "b"]).shape == (2, 2)
    assert tokenizer(WAVE, input_sample_hz=16_000).shape == (2, 25)


@every_dtype
def test_musiclm_with_prompt(dtype):
    """Text, audio prompt and ranking, whole and as a stream."""
    musiclm = small.small_musiclm(codec=small.small_spectral_codec().eval()).to(dtype)
    prompt = {"prime_wave": WAVE[0, :400], "prime_wave_input_sample_hz": 16_000}
    assert musiclm("a low tone", seconds=0.1, seed=1, num_samples=2, **prompt).isfinite().all()
    times = {"seconds": 0.2, "chunk_seconds": 0.1, "rank_seconds": 0.1}
    chunks = list(musiclm.stream("a low tone", num_samples=2, seed=1, **times, **prompt))
    assert sum(chunk.wave.shape[-1] for chunk in chunks) == 1600
    assert musiclm.audio_lm(text=["a low tone"], seconds=0.1).isfinite().all()


@pytest.mark.parametrize("part", ["encoder", "decoder", "tokenizer", "audio", "text"])
def test_outputs_that_are_not_finite_are_named(part):
    """A search for the nearest code returns code 0 for NaN, on which a language model would be trained."""
    codec, tokenizer, mulan = small.small_soundstream().eval(), small.small_tokenizer(), small.small_mulan()
    modules = {"encoder": codec.encoder, "decoder": codec.decoder, "tokenizer": tokenizer.encoder}
    calls = {
        "encoder": [lambda: codec.tokenize(WAVE), lambda: codec.encoder_stream().push(WAVE)],
        "decoder": [lambda: codec.decode_from_codebook_indices(torch.zeros(1, 4, 2, dtype=torch.long))],
        "tokenizer": [lambda: tokenizer(WAVE)],
        "audio": [lambda: mulan.get_audio_latents(WAVE)],
        "text": [lambda: mulan.get_text_latents("a low tone")],
    }
    with torch.no_grad():
        for weight in modules.get(part, mulan).parameters():
            weight.fill_(torch.inf)
    for call in calls[part]:
        with pytest.raises(ValueError, match=r"are not finite .*look for NaN in the weights, or compute in float32"):
            call()


def test_musicgen_under_autocast():
    """Its decode session allocates float32, which autocast must not mix with bfloat16 in the cross-attention."""
    text = TextTowerEncoder(TextTransformer(dim=16, depth=1, heads=1))
    musicgen = MusicGen(codec=small.small_soundstream(), text_conditioner=text, dim=16, depth=1, heads=1, max_seconds=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert musicgen.generate(texts="a low tone", seconds=0.05, seeds=0).waves[0].isfinite().all()
