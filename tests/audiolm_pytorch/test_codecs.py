import math

import pytest
import torch
from einops import rearrange

from audiolm_pytorch.codecs import (
    AudioLMSoundStream,
    Codec,
    MusicLMSoundStream,
    SoundStream,
    SpectralSoundStream,
    spectral,
)
from audiolm_pytorch.codecs.convolutional import ConvDecoder, ConvEncoder
from audiolm_pytorch.codecs.losses import MultiScaleMelLoss
from audiolm_pytorch.codecs.quantizer import ResidualQuantizer, code_usage
from audiolm_pytorch.codecs.spectral import SpectralDecoder, SpectralEncoder
from audiolm_pytorch.io import save_module

RATE_HZ = 16000


def tiny_conv() -> SoundStream:
    return SoundStream(codebook_size=16, rq_num_quantizers=3, codebook_dim=8, channels=4, strides=(2, 4)).eval()


def tiny_spectral() -> SoundStream:
    return SpectralSoundStream(
        dim=16, encoder_depth=1, decoder_depth=1, hop_samples=64, codebook_size=16, rq_num_quantizers=3, code_dim=4
    ).eval()


both_codecs = pytest.mark.parametrize("make_codec", [tiny_conv, tiny_spectral])


@both_codecs
def test_codec_meets_the_contract(make_codec):
    """Everything downstream relies on these attributes and shapes."""
    torch.manual_seed(0)
    codec = make_codec()
    assert isinstance(codec, Codec)
    codes = codec.tokenize(torch.randn(2, 1000))
    assert codes.dtype == torch.int64
    assert codes.shape == (2, codec.num_frames(1000), codec.num_quantizers)
    assert 0 <= codes.min() and codes.max() < codec.codebook_size


@both_codecs
def test_any_number_of_samples_comes_back(make_codec):
    """A codec that trims or pads its output breaks every length downstream."""
    torch.manual_seed(0)
    codec = make_codec()
    for num_samples in (1, 7, 8, 63, 64, 65, 500, 641):
        wave = torch.randn(1, num_samples)
        assert codec(wave, return_recons_only=True).shape == (1, 1, num_samples)
        decoded = codec.decode_from_codebook_indices(codec.tokenize(wave), num_samples=num_samples)
        assert decoded.shape == (1, 1, num_samples)


@both_codecs
def test_decoding_codes_equals_the_reconstruction(make_codec):
    """Codes must carry all that the decoder gets: tokenize then decode is the forward pass."""
    torch.manual_seed(0)
    codec = make_codec()
    wave = torch.randn(2, 1024)
    decoded = codec.decode_from_codebook_indices(codec.tokenize(wave))
    torch.testing.assert_close(decoded, codec(wave, return_recons_only=True), rtol=1e-4, atol=1e-5)


@both_codecs
def test_an_item_alone_equals_itself_in_a_padded_batch(make_codec):
    """Padding that leaks into codes makes them depend on the neighbours in the batch."""
    torch.manual_seed(0)
    codec = make_codec()
    lengths = torch.tensor([640, 333])
    wave = torch.randn(2, 640)
    codes = codec.tokenize(wave, lengths)
    for row, length in enumerate(lengths.tolist()):
        frames = codec.num_frames(length)
        assert torch.equal(codes[row, :frames], codec.tokenize(wave[row : row + 1, :length])[0])
        assert (codes[row, frames:] == -1).all()


@both_codecs
def test_any_number_of_levels_decodes(make_codec):
    """The coarse stage alone must be playable: a prefix of the levels is a valid input."""
    torch.manual_seed(0)
    codec = make_codec()
    codes = codec.tokenize(torch.randn(1, 512))
    for levels in range(1, codec.num_quantizers + 1):
        assert torch.isfinite(codec.decode_from_codebook_indices(codes[..., :levels])).all()


def test_convolutional_codec_is_causal():
    """Streaming needs outputs that never depend on the future: changing late samples leaves earlier output alone."""
    torch.manual_seed(0)
    codec = tiny_conv()
    wave = torch.randn(1, 512)
    changed = wave.clone()
    changed[:, 256:] += torch.randn(1, 256)
    before, after = (codec.encoder(rearrange(w, "b n -> b 1 n")) for w in (wave, changed))
    assert torch.equal(before[:, : 256 // codec.downsample_factor], after[:, : 256 // codec.downsample_factor])
    assert not torch.equal(before, after)
    frames = torch.randn(1, 64, 8)
    late = frames.clone()
    late[:, 32:] += 1
    assert torch.equal(codec.decoder(frames)[..., :256], codec.decoder(late)[..., :256])


def test_spectral_head_inverts_the_stft():
    """The inverse-STFT head is exact: the encoder's own framing, put back, gives the wave (interior samples)."""
    torch.manual_seed(0)
    hop, window_samples = 64, 256
    encoder = SpectralEncoder(dim=8, depth=1, hop_samples=hop)
    decoder = SpectralDecoder(dim=8, depth=1, hop_samples=hop)
    wave = torch.randn(1, hop * 12)
    pad = (window_samples - hop) // 2
    spectrum = torch.stft(
        torch.nn.functional.pad(wave, (pad, pad)),
        window_samples,
        hop,
        window=encoder.window,
        center=False,
        return_complex=True,
    )
    assert spectrum.shape[-1] == 12
    inverse = decoder._overlap_add(spectrum)
    torch.testing.assert_close(inverse[:, hop:-hop], wave[:, hop:-hop], rtol=1e-4, atol=1e-4)


def test_quantizer_encodes_as_its_training_path():
    """The short loop used at inference gives the indices of vector-quantize-pytorch."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dim=16, codebook_size=32, num_quantizers=4, codebook_dim=8)
    frames = torch.randn(3, 50, 16)
    quantizer.initialise(rearrange(frames, "b f d -> (b f) d"))
    quantizer.eval()
    output = quantizer(frames)
    codes = quantizer.encode(frames)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(quantizer.decode(codes), output.frames, rtol=1e-4, atol=1e-5)


def test_initialised_codebooks_are_in_use():
    """Codebooks that start from k-means over many frames leave no code unused (the replica's codecs die here)."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dim=8, codebook_size=64, num_quantizers=2)
    frames = torch.randn(4000, 8)
    quantizer.initialise(frames)
    usage = code_usage(quantizer.encode(frames[None]), 64)
    assert (usage["usage"] > 0.95).all()
    assert (usage["perplexity"] > 0.5).all()


def test_each_level_refines_the_one_before():
    """Residual order: every further level brings the frames closer."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(dim=8, codebook_size=32, num_quantizers=4)
    frames = torch.randn(1, 2000, 8)
    quantizer.initialise(frames[0])
    codes = quantizer.encode(frames)
    errors = [(quantizer.decode(codes[..., :levels]) - frames).square().mean().item() for levels in range(1, 5)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("wave", [torch.zeros(1, 1, 4000), torch.ones(1, 1, 4000), torch.full((1, 1, 4000), 30.0)])
def test_mel_loss_is_finite_on_degenerate_audio(wave):
    """Silence, DC and clipped audio occur in real folders; log(0) must not reach the weights."""
    loss_fn = MultiScaleMelLoss(RATE_HZ)
    reconstruction = torch.zeros(1, 1, 4000, requires_grad=True)
    loss = loss_fn(reconstruction, wave)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(reconstruction.grad).all()


def test_mel_loss_has_no_empty_band():
    """A band between two STFT bins would never be trained; every filter of every window must reach a bin."""
    for scale in MultiScaleMelLoss(RATE_HZ).scales:
        tone_response = scale(torch.randn(1, 8192)).amin()
        assert tone_response > 0


@both_codecs
def test_saved_codec_loads_equal(make_codec, tmp_path):
    """A codec travels as safetensors + JSON; codes and fingerprint must survive."""
    torch.manual_seed(0)
    codec = make_codec()
    save_module(codec, tmp_path / "codec")
    loaded = SoundStream.init_and_load_from(tmp_path / "codec")
    wave = torch.randn(1, 640)
    assert torch.equal(codec.tokenize(wave), loaded.tokenize(wave))
    assert codec.fingerprint == loaded.fingerprint


def test_published_presets_have_their_rates():
    """Numbers of the papers: 50 frames a second, 12 levels of 1024 codes."""
    for codec, sample_hz in ((AudioLMSoundStream(channels=2), 16000), (MusicLMSoundStream(channels=2), 24000)):
        assert codec.target_sample_hz == sample_hz
        assert sample_hz / codec.downsample_factor == 50
        assert (codec.num_quantizers, codec.codebook_size) == (12, 1024)
        assert codec.num_quantizers * math.log2(codec.codebook_size) * 50 == 6000


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.randn(512), r"\[b, n\]"),
        (torch.randn(1, 2, 512), r"\[b, 1, n\]"),
        (torch.randn(1, 0), "n > 0"),
        (torch.full((1, 512), float("nan")), "NaN"),
        (torch.zeros(1, 512, dtype=torch.int16), "floating point"),
    ],
)
def test_bad_audio_is_refused_with_the_reason(wave, message):
    """Wrong rank, channels, empty, NaN and integer audio: an error that says what is needed."""
    with pytest.raises(ValueError, match=message):
        tiny_spectral().tokenize(wave)


def test_bad_codes_are_refused():
    """Codes of another codec, or padding left in, must not index silently."""
    codec = tiny_spectral()
    with pytest.raises(ValueError, match="0..15"):
        codec.decode_from_codebook_indices(torch.full((1, 4, 3), -1))
    with pytest.raises(ValueError, match="1..3"):
        codec.decode_from_codebook_indices(torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="asked for"):
        codec.decode_from_codebook_indices(torch.zeros(1, 4, 3, dtype=torch.long), num_samples=10_000)


def test_parts_that_do_not_fit_are_refused():
    """A decoder with other strides would play at another speed."""
    with pytest.raises(ValueError, match="same strides"):
        SoundStream(
            encoder=ConvEncoder(strides=(2, 4), dim=8), decoder=ConvDecoder(strides=(2, 2), dim=8), codebook_dim=8
        )


def test_long_waves_pass_the_spectral_pair_in_pieces(monkeypatch):
    """An hour at once would take gigabytes; in pieces with their context it gives the same codes and samples."""
    torch.manual_seed(0)
    codec = tiny_spectral()
    wave, lengths = torch.randn(2, 1, 64 * 101), torch.tensor([64 * 101, 64 * 70 - 5])
    codes = codec.tokenize(wave, lengths)
    sound = codec.decode_from_codebook_indices(codes[:1])
    sizes = []
    decode = SpectralDecoder._decode
    monkeypatch.setattr(spectral, "_PIECE_FRAMES", 20)
    monkeypatch.setattr(
        SpectralDecoder, "_decode", lambda self, frames: sizes.append(frames.shape[1]) or decode(self, frames)
    )
    assert torch.equal(codec.tokenize(wave, lengths), codes)
    torch.testing.assert_close(codec.decode_from_codebook_indices(codes[:1]), sound, atol=1e-6, rtol=1e-4)
    assert len(sizes) == 6 and max(sizes) < 50


@pytest.mark.gpu
@both_codecs
def test_lengths_may_lie_on_the_cpu(make_codec):
    """A prime on the GPU comes with lengths that were counted on the CPU."""
    codec = make_codec().cuda()
    wave = torch.randn(2, 640, device="cuda")
    assert (codec.tokenize(wave, torch.tensor([640, 64]))[1, -1] == -1).all()
