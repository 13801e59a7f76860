"""The snippets that users of the earlier replicas know, at small sizes: their keyword names are a promise."""

import numpy as np
import pytest
import soundfile
import torch

from audiolm_pytorch import (
    AudioLM,
    BestRQEncoder,
    CoarseTransformer,
    CoarseTransformerTrainer,
    FineTransformer,
    FineTransformerTrainer,
    KMeansTokenizer,
    SemanticTransformer,
    SemanticTransformerTrainer,
    SoundStream,
    SoundStreamTrainer,
)
from audiolm_pytorch.saving.modules import save_module
from musiclm_pytorch import (
    AudioSpectrogramTransformer,
    MuLaN,
    MuLaNEmbedQuantizer,
    MuLaNTrainer,
    MusicLM,
    TextTransformer,
)

RATE_HZ = 16000
SAMPLES = 320 * 32  # of a crop


@pytest.fixture(scope="module")
def audio_folder(tmp_path_factory):
    """Six tones of 1.5 s with captions."""
    folder = tmp_path_factory.mktemp("audio")
    seconds = np.arange(int(1.5 * RATE_HZ)) / RATE_HZ
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", 0.3 * np.sin(2 * np.pi * 220 * (number + 1) * seconds), RATE_HZ)
    lines = [f'{{"audio": "{number}.wav", "caption": "tone number {number}"}}\n' for number in range(6)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def mulan():
    """The first snippet, narrower."""
    torch.manual_seed(0)
    audio_transformer = AudioSpectrogramTransformer(
        dim=32, depth=1, heads=2, dim_head=16, spec_n_fft=128, spec_win_length=24, spec_aug_stretch_factor=0.8
    )
    text_transformer = TextTransformer(dim=32, depth=1, heads=2, dim_head=16)
    return MuLaN(audio_transformer=audio_transformer, text_transformer=text_transformer)


@pytest.fixture(scope="module")
def quantizer(mulan):
    return MuLaNEmbedQuantizer(
        mulan=mulan, conditioning_dims=(32, 32, 32), namespaces=("semantic", "coarse", "fine"), codebook_size=16
    )


@pytest.fixture(scope="module")
def wav2vec():
    """Any SemanticTokenizer will do; this one is ours."""
    torch.manual_seed(0)
    return KMeansTokenizer(
        encoder=BestRQEncoder(dim=16, depth=1, heads=1), layer=1, centroids=torch.randn(20, 16)
    ).eval()


@pytest.fixture(scope="module")
def soundstream():
    torch.manual_seed(0)
    return SoundStream(codebook_size=32, rq_num_quantizers=4, channels=2, codebook_dim=16).eval()


def test_mulan_snippet(mulan):
    """Waves and token ids in, a loss out; latents of unit norm."""
    wavs = torch.randn(2, 1024)
    texts = torch.randint(0, 20000, (2, 256))
    loss = mulan(wavs, texts)
    loss.backward()
    for embeds in (mulan.get_audio_latents(wavs), mulan.get_text_latents(texts)):
        assert embeds.shape == (2, 128)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))


def test_quantizer_snippet(mulan):
    """Eight levels of embeddings by default, for the namespace asked for."""
    quantizer = MuLaNEmbedQuantizer(
        mulan=mulan, conditioning_dims=(1024, 1024, 1024), namespaces=("semantic", "coarse", "fine")
    )
    conds = quantizer(wavs=torch.randn(2, 1024), namespace="semantic")
    assert conds.shape == (2, 8, 1024)


@pytest.mark.slow
def test_soundstream_snippet(soundstream, tmp_path):
    """Tokenize, decode, compare with the reconstruction; save and load."""
    audio = torch.randn(1, 512 * 320)
    codes = soundstream.tokenize(audio)
    wave = soundstream.decode_from_codebook_indices(codes)
    assert torch.allclose(wave, soundstream(audio, return_recons_only=True), atol=1e-5)
    save_module(soundstream, tmp_path / "codec")
    loaded = SoundStream.init_and_load_from(tmp_path / "codec")
    assert torch.equal(loaded.tokenize(audio), codes)


@pytest.mark.slow
def test_soundstream_trainer_snippet(audio_folder, tmp_path):
    """A codec trains from a folder, with the paper's convolutions."""
    soundstream = SoundStream(codebook_size=16, rq_num_quantizers=2, channels=2, codebook_dim=8)
    trainer = SoundStreamTrainer(
        soundstream,
        folder=audio_folder,
        batch_size=2,
        data_max_length=SAMPLES,
        num_train_steps=2,
        results_folder=tmp_path,
    )
    assert trainer.train().step == 2


def test_mulan_trainer_snippet(mulan, audio_folder, tmp_path):
    """MuLaN trains from a manifest with captions."""
    trainer = MuLaNTrainer(
        mulan=mulan, folder=audio_folder, batch_size=2, seconds=1.0, num_train_steps=1, results_folder=tmp_path
    )
    assert trainer.train().step == 1


@pytest.fixture(scope="module")
def stages(wav2vec):
    torch.manual_seed(0)
    sizes = dict(dim=32, depth=1, heads=2, dim_head=16, audio_text_condition=True)
    return (
        SemanticTransformer(num_semantic_tokens=wav2vec.codebook_size, **sizes),
        CoarseTransformer(
            num_semantic_tokens=wav2vec.codebook_size, codebook_size=32, num_coarse_quantizers=2, **sizes
        ),
        FineTransformer(num_coarse_quantizers=2, num_fine_quantizers=2, codebook_size=32, **sizes),
    )


@pytest.mark.slow
def test_stage_trainer_snippets(stages, wav2vec, soundstream, quantizer, audio_folder, tmp_path):
    """Each stage trains one step from waves, with any semantic tokenizer."""
    semantic_transformer, coarse_transformer, fine_transformer = stages
    common = dict(
        audio_conditioner=quantizer,
        folder=audio_folder,
        batch_size=1,
        data_max_length=SAMPLES,
        num_train_steps=1,
    )
    trainers = (
        SemanticTransformerTrainer(
            transformer=semantic_transformer, wav2vec=wav2vec, results_folder=tmp_path / "semantic", **common
        ),
        CoarseTransformerTrainer(
            transformer=coarse_transformer,
            codec=soundstream,
            wav2vec=wav2vec,
            results_folder=tmp_path / "coarse",
            **common,
        ),
        FineTransformerTrainer(
            transformer=fine_transformer, codec=soundstream, results_folder=tmp_path / "fine", **common
        ),
    )
    for trainer in trainers:
        assert trainer.train().step == 1


@pytest.mark.slow
def test_audiolm_and_musiclm_snippets(stages, wav2vec, soundstream, quantizer):
    """Unconditional, primed and text-conditioned generation; the best of four candidates."""
    semantic_transformer, coarse_transformer, fine_transformer = stages
    audio_lm = AudioLM(
        wav2vec=wav2vec,
        codec=soundstream,
        semantic_transformer=semantic_transformer,
        coarse_transformer=coarse_transformer,
        fine_transformer=fine_transformer,
        audio_conditioner=quantizer,
    )
    assert audio_lm(batch_size=1, seconds=0.4).shape == (1, 6400)
    prime_wave = torch.randn(1, 24000)
    wave = audio_lm(prime_wave=prime_wave, prime_wave_input_sample_hz=24000, seconds=1.4)
    assert wave.shape == (1, 22400)
    assert audio_lm(text=["the crystalline sounds of the piano"], seconds=0.4).shape == (1, 6400)
    musiclm = MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)
    music = musiclm("the crystalline sounds of the piano in a ballroom", num_samples=4, seconds=0.4)
    assert music.shape == (1, 6400)
