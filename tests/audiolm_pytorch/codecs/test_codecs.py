import math
import random

import pytest
import torch
from einops import rearrange

from audiolm_pytorch.codecs import (
    AudioLMSoundStream,
    Codec,
    MusicLMSoundStream,
    SoundStream,
    SpectralSoundStream,
)
from audiolm_pytorch.codecs.convolutional import ConvDecoder, ConvEncoder
from audiolm_pytorch.codecs.spectral import SpectralDecoder
from audiolm_pytorch.codecs.training.losses import MultiScaleMelLoss
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.saving.modules import build_module, module_spec, save_module
from tests.helpers.fakes import FakeCodec

RATE_HZ = 16000


def tiny_conv(**kwargs) -> SoundStream:
    sizes = dict(codebook_size=16, rq_num_quantizers=3, codebook_dim=8, channels=4, strides=(2, 4))
    return SoundStream(**{**sizes, **kwargs}).eval()


def tiny_spectral() -> SoundStream:
    return SpectralSoundStream(
        dim=16, encoder_depth=1, decoder_depth=1, hop_samples=64, codebook_size=16, rq_num_quantizers=3, code_dim=4
    ).eval()


QUANTIZERS = {
    "codebooks": {},
    "groups": dict(rq_groups=2),
    "lookup-free": dict(use_lookup_free_quantizer=True),
    "lookup-free groups": dict(use_lookup_free_quantizer=True, rq_groups=2),
    "finite-scalar": dict(use_finite_scalar_quantizer=True),
    "finite-scalar groups": dict(use_finite_scalar_quantizer=True, rq_groups=2),
}
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)
both_codecs = pytest.mark.parametrize("make_codec", [tiny_conv, tiny_spectral])


@both_codecs
def test_codec_meets_the_contract(make_codec):
    """All other modules rely on these attributes and shapes."""
    torch.manual_seed(0)
    codec = make_codec()
    assert isinstance(codec, Codec)
    codes = codec.tokenize(torch.randn(2, 1000))
    assert codes.dtype == torch.int64
    assert codes.shape == (2, codec.num_frames(1000), codec.num_quantizers)
    assert 0 <= codes.min() and codes.max() < codec.codebook_size


@pytest.mark.slow
@both_codecs
def test_any_number_of_samples_is_restored(make_codec):
    """200 lengths from one sample to several frames are restored exactly."""
    codec = make_codec()
    sizes = [1, 7, 8, 63, 64, 65, *random.sample(range(2, 600), 194)]
    with torch.no_grad():
        for num_samples in sizes:
            wave = torch.randn(1, num_samples)
            assert codec(wave, return_recons_only=True).shape == (1, 1, num_samples)
            codes = codec.tokenize(wave)
            assert codes.shape[1] == codec.num_frames(num_samples)
            assert codec.decode_from_codebook_indices(codes, num_samples=num_samples).shape == (1, 1, num_samples)
    assert len(set(sizes)) >= 190


@pytest.mark.parametrize(
    ("sample_hz", "strides"),
    [(16000, (4, 8, 10)), (24000, (6, 8, 10)), (32000, (8, 8, 10)), (44100, (7, 7, 9)), (48000, (8, 10, 12))],
)
@pytest.mark.parametrize("audio_channels", [1, 2])
def test_every_rate_and_stereo(sample_hz, strides, audio_channels):
    """Any rate and samples per frame, mono and stereo; both channels affect the codes."""
    codec = tiny_conv(target_sample_hz=sample_hz, strides=strides, channels=2, audio_channels=audio_channels)
    wave = torch.randn(2, audio_channels, sample_hz // 20 + 11)
    codes = codec.tokenize(wave)
    assert codes.shape[1] == -(-wave.shape[-1] // math.prod(strides))
    assert codec.decode_from_codebook_indices(codes, wave.shape[-1]).shape == wave.shape
    assert codec.encoder_latency_seconds == codec.downsample_factor / sample_hz
    if audio_channels == 2:
        other = torch.stack([wave[:, 0], torch.randn_like(wave[:, 1])], dim=1)
        with torch.no_grad():
            assert not torch.allclose(codec.encoder(wave[..., :3360]), codec.encoder(other[..., :3360]))


def test_the_spectral_pair_supports_stereo():
    """Two channels are encoded together and decoded as two channels."""
    codec = SpectralSoundStream(dim=16, encoder_depth=1, decoder_depth=1, hop_samples=16, code_dim=4, audio_channels=2)
    rebuilt = build_module(module_spec(codec))
    wave = torch.randn(2, 2, 301)
    assert rebuilt(wave, return_recons_only=True).shape == wave.shape
    swapped = codec.eval()(wave.flip(1), return_recons_only=True)
    assert not torch.allclose(swapped, codec(wave, return_recons_only=True))
    assert "channels" not in tiny_spectral().encoder.config  # saved models keep their hash


@pytest.mark.slow
def test_snippet_of_the_design():
    """The constructor call of the design, with its audio: the decoded codes are the reconstruction."""
    soundstream = SoundStream(
        codebook_size=4096,
        rq_num_quantizers=8,
        rq_groups=2,
        use_lookup_free_quantizer=True,
        use_finite_scalar_quantizer=False,
        attn_window_size=128,
        attn_depth=2,
        channels=2,
    )
    audio = torch.randn(1, 512 * 320)
    codes = soundstream.tokenize(audio)
    assert codes.shape == (1, 512, 16) and soundstream.num_quantizers == 16
    with torch.no_grad():
        # also in training mode, as a new codec is: no level may be left out then
        several = [soundstream(audio, return_recons_only=True) for _ in range(4)]
    for recons in several:
        assert torch.allclose(soundstream.decode_from_codebook_indices(codes), recons, atol=1e-5)


@pytest.mark.slow
@each_quantizer
def test_every_quantizer_saves_and_loads(quantizer, tmp_path):
    """Quantizer, attention and denoising condition are saved with the codec."""
    codec = tiny_conv(**QUANTIZERS[quantizer], attn_window_size=3, attn_depth=1, denoising=FiLM(dim=8))
    torch.nn.init.normal_(codec.denoising.table)
    save_module(codec, tmp_path / "codec")
    loaded = SoundStream.init_and_load_from(tmp_path / "codec")
    wave = torch.randn(2, 200)
    assert loaded.config == codec.config and loaded.fingerprint() == codec.fingerprint()
    for denoise in (False, True):
        assert torch.equal(loaded.tokenize(wave, denoise=denoise), codec.tokenize(wave, denoise=denoise))
    assert loaded.num_quantizers == codec.num_quantizers == 3 * (2 if "groups" in quantizer else 1)


@each_quantizer
def test_any_prefix_of_the_columns_is_a_coarser_version(quantizer):
    """Codes run level by level, all groups of a level together; more columns are nearer to the frames."""
    codec = tiny_conv(**QUANTIZERS[quantizer])
    wave = torch.randn(4, 4000)
    with torch.no_grad():
        frames = codec.encoder(rearrange(wave, "b n -> b 1 n"))
        codec.quantizer.initialise(rearrange(frames, "b f d -> (b f) d"))
        codes = codec.tokenize(wave)
        groups = codec.num_quantizers // 3
        # codebooks are fitted to the frames; the others have projections yet to learn: compare with all columns
        is_fitted = quantizer in ("codebooks", "groups")
        target = frames if is_fitted else codec.quantizer(frames).frames
        errors = [
            (codec.quantizer.decode(codes[..., :columns]) - target).square().mean().item()
            for columns in range(1, codec.num_quantizers + 1)
        ]
    whole_levels = errors[groups - 1 :: groups]
    assert whole_levels == sorted(whole_levels, reverse=True) and whole_levels[-1] < 0.5 * whole_levels[0]
    for columns in range(1, codec.num_quantizers + 1):
        wave = codec.decode_from_codebook_indices(codes[..., :columns])
        assert wave.shape == (4, 1, 4000) and wave.isfinite().all()


@each_quantizer
def test_every_parameter_has_a_gradient(quantizer):
    """With attention, condition and any quantizer."""
    codec = tiny_conv(**QUANTIZERS[quantizer], attn_window_size=3, attn_depth=1, denoising=FiLM(dim=8)).train()
    output = codec(torch.randn(2, 400), denoise=torch.tensor([True, False]))
    (output.wave.square().mean() + output.commitment_loss).backward()
    without = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_denoising_condition():
    """Initially both flags leave codes unchanged; after training only the flagged items change."""
    plain = tiny_conv()
    codec = tiny_conv(denoising=FiLM(dim=8))
    codec.load_state_dict({**plain.state_dict(), "denoising.table": codec.denoising.table.detach()})
    wave, flags = torch.randn(2, 400), torch.tensor([False, True])
    for denoise in (False, True, flags):
        assert torch.equal(codec.tokenize(wave, denoise=denoise), plain.tokenize(wave))
    with torch.no_grad():
        codec.denoising.table[1] = torch.randn(16)
    codes = codec.tokenize(wave, denoise=flags)
    assert torch.equal(codes[0], plain.tokenize(wave)[0])
    assert not torch.equal(codes[1], plain.tokenize(wave)[1])
    recons = codec(wave, return_recons_only=True, denoise=flags)
    torch.testing.assert_close(codec.decode_from_codebook_indices(codes), recons, rtol=1e-4, atol=1e-5)
    for misuse in (torch.tensor([1, 0]), torch.tensor([True, False, True]), torch.ones(2, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="denoise must"):
            codec.tokenize(wave, denoise=misuse)
    for ask in (True, flags):
        with pytest.raises(ValueError, match=r"denoising=FiLM\(dim=8\)"):
            plain(wave, denoise=ask)
    assert torch.equal(plain.tokenize(wave, denoise=torch.tensor([False, False])), plain.tokenize(wave))


@both_codecs
@pytest.mark.parametrize(
    "wave",
    [torch.zeros(1, 300), torch.ones(1, 300), torch.randn(1, 300).sign() * 30, torch.ones(1, 1), torch.zeros(1, 1)],
    ids=["silent", "constant", "clipped", "one sample", "one silent sample"],
)
def test_odd_audio_is_handled(make_codec, wave):
    """Silence, DC, overload and a single sample have finite outputs and gradients."""
    codec = make_codec().train()
    output = codec(wave)
    (output.wave.square().mean() + output.commitment_loss).backward()
    assert output.wave.shape == (1, *wave.shape) and output.wave.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in codec.parameters())
    codec.eval()
    assert codec.decode_from_codebook_indices(codec.tokenize(wave)).isfinite().all()


@both_codecs
def test_other_precisions_are_converted(make_codec):
    """float64 and float16 waves are converted to the precision of the weights."""
    codec, wave = make_codec(), torch.randn(1, 300)
    assert torch.equal(codec.tokenize(wave.double()), codec.tokenize(wave))
    assert torch.equal(codec.tokenize(wave.half()), codec.tokenize(wave.half().float()))


@both_codecs
def test_decoding_codes_equals_the_reconstruction(make_codec):
    """Tokenize and decode equal the forward pass."""
    torch.manual_seed(0)
    codec = make_codec()
    wave = torch.randn(2, 1024)
    decoded = codec.decode_from_codebook_indices(codec.tokenize(wave))
    torch.testing.assert_close(decoded, codec(wave, return_recons_only=True), rtol=1e-4, atol=1e-5)


@both_codecs
def test_an_item_alone_equals_itself_in_a_padded_batch(make_codec):
    """Padding does not change codes."""
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
def test_frames_of_an_item_do_not_depend_on_padding(make_codec, monkeypatch):
    """Stricter than codes: the frames before the quantizer, of a short and a long item."""
    codec, lengths, given = make_codec(), [640, 333], []
    encode = codec.quantizer.encode
    monkeypatch.setattr(codec.quantizer, "encode", lambda frames: given.append(frames) or encode(frames))
    wave = torch.randn(2, 640)
    codec.tokenize(wave, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        codec.tokenize(wave[row : row + 1, :length])
        alone = given[-1][0]
        torch.testing.assert_close(given[0][row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


@both_codecs
def test_any_number_of_levels_decodes(make_codec):
    """A prefix of the levels is a valid input, e.g. the output of the coarse stage."""
    torch.manual_seed(0)
    codec = make_codec()
    codes = codec.tokenize(torch.randn(1, 512))
    for levels in range(1, codec.num_quantizers + 1):
        assert torch.isfinite(codec.decode_from_codebook_indices(codes[..., :levels])).all()


def test_spectral_head_inverts_the_stft():
    """The inverse STFT of the decoder restores the wave of the encoder's STFT (interior samples)."""
    torch.manual_seed(0)
    hop, window_samples = 64, 256
    decoder = SpectralDecoder(dim=8, depth=1, hop_samples=hop)
    wave = torch.randn(1, hop * 12)
    pad = (window_samples - hop) // 2
    spectrum = torch.stft(
        torch.nn.functional.pad(wave, (pad, pad)),
        window_samples,
        hop,
        window=torch.hann_window(window_samples),
        center=False,
        return_complex=True,
    )
    assert spectrum.shape[-1] == 12
    inverse = decoder._overlap_add(spectrum)
    torch.testing.assert_close(inverse[:, hop:-hop], wave[:, hop:-hop], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wave", [torch.zeros(1, 1, 4000), torch.ones(1, 1, 4000), torch.full((1, 1, 4000), 30.0)])
def test_mel_loss_is_finite_on_degenerate_audio(wave):
    """Silence, DC and clipped audio do not cause log(0)."""
    loss_fn = MultiScaleMelLoss(RATE_HZ)
    reconstruction = torch.zeros(1, 1, 4000, requires_grad=True)
    loss = loss_fn(reconstruction, wave)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(reconstruction.grad).all()


def test_mel_loss_has_no_empty_band():
    """Every mel filter of every window contains an STFT bin."""
    for scale in MultiScaleMelLoss(RATE_HZ).scales:
        tone_response = scale(torch.randn(1, 8192)).amin()
        assert tone_response > 0


@both_codecs
def test_saved_codec_loads_equal(make_codec, tmp_path):
    """Codes and fingerprint of a saved codec are unchanged."""
    torch.manual_seed(0)
    codec = make_codec()
    save_module(codec, tmp_path / "codec")
    loaded = SoundStream.init_and_load_from(tmp_path / "codec")
    wave = torch.randn(1, 640)
    assert torch.equal(codec.tokenize(wave), loaded.tokenize(wave))
    assert codec.fingerprint() == loaded.fingerprint()


@pytest.mark.slow
def test_published_presets_have_their_rates():
    """Numbers of the papers: 50 frames a second, 12 levels of 1024 codes."""
    for codec, sample_hz in ((AudioLMSoundStream(channels=2), 16000), (MusicLMSoundStream(channels=2), 24000)):
        assert codec.target_sample_hz == sample_hz
        assert sample_hz / codec.downsample_factor == 50
        assert (codec.num_quantizers, codec.codebook_size) == (12, 1024)
        assert codec.num_quantizers * math.log2(codec.codebook_size) * 50 == 6000


def test_bitrate():
    """Levels times bits times frames a second; 8 x 1024 at 75 Hz is 6 kbps, as in the paper."""
    codec = SoundStream(channels=2, codebook_dim=8, strides=(2, 4, 5, 8), target_sample_hz=24000)
    assert codec.bitrate_kbps() == pytest.approx(6.0)
    assert codec.bitrate_kbps(2) == pytest.approx(1.5)
    assert FakeCodec().bitrate_kbps() == pytest.approx(4 * 4 * 50 / 1000)
    for levels in (0, 9):
        with pytest.raises(ValueError, match=f"1..8, got {levels}"):
            codec.bitrate_kbps(levels)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.randn(1, 2, 512), r"\[b, 1, n\].*mean\(dim=1\)"),
        (torch.randn(1, 512, 1), r"\[b, 1, n\].*transpose"),
        (torch.randn(1, 1, 1, 512), r"\[b, 1, n\]"),
        (torch.randn(1, 0), "not empty"),
        (torch.cat([torch.randn(1, 511), torch.full((1, 1), -math.inf)], dim=1), "infinite"),
        (torch.full((1, 512), float("nan")), "NaN"),
        (torch.zeros(1, 512, dtype=torch.int16), "float tensor"),
    ],
)
def test_bad_audio_raises_with_the_reason(wave, message):
    """Wrong rank, channels, empty, NaN and integer audio; the message states what is needed."""
    with pytest.raises(ValueError, match=message):
        tiny_spectral().tokenize(wave)
    with pytest.raises(ValueError, match=message):
        tiny_conv()(wave)


def test_mono_for_a_stereo_codec_raises_with_the_fix():
    """The fix in the message works."""
    codec, wave = tiny_conv(audio_channels=2), torch.randn(3, 80)
    for mono in (wave, wave.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"repeat\(1, 2, 1\)"):
            codec.tokenize(mono)
        assert codec.tokenize(mono.view(len(mono), 1, -1).repeat(1, 2, 1)).shape == (3, 10, 3)


def test_bad_codes_raise():
    """Codes of another codec, padding, too many levels, floats, too many samples."""
    codec = tiny_spectral()
    with pytest.raises(ValueError, match="0..15"):
        codec.decode_from_codebook_indices(torch.full((1, 4, 3), -1))
    with pytest.raises(ValueError, match="1..3"):
        codec.decode_from_codebook_indices(torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="integers"):
        codec.decode_from_codebook_indices(torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="num_samples=10000"):
        codec.decode_from_codebook_indices(torch.zeros(1, 4, 3, dtype=torch.long), num_samples=10_000)


def test_incompatible_parts_raise():
    """Different strides, channels or widths."""
    with pytest.raises(ValueError, match="same strides"):
        SoundStream(
            encoder=ConvEncoder(strides=(2, 4), dim=8), decoder=ConvDecoder(strides=(2, 2), dim=8), codebook_dim=8
        )
    with pytest.raises(ValueError, match="audio channels"):
        tiny_conv(encoder=ConvEncoder(strides=(2, 4), dim=8), audio_channels=2)
    with pytest.raises(ValueError, match=r"FiLM\(dim=8\)"):
        tiny_conv(denoising=FiLM(dim=4))


@pytest.mark.gpu
@both_codecs
def test_lengths_may_be_on_the_cpu(make_codec):
    """Waves on the GPU may have lengths on the CPU."""
    codec = make_codec().cuda()
    wave = torch.randn(2, 640, device="cuda")
    assert (codec.tokenize(wave, torch.tensor([640, 64]))[1, -1] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int32])
def test_codes_of_every_integer_type_decode(dtype):
    """Codes of a file or of numpy need no conversion."""
    sizes = dict(channels=2, codebook_dim=8, codebook_size=16, rq_num_quantizers=2, strides=(2, 5))
    codec, codes = SoundStream(**sizes).eval(), torch.randint(16, (1, 4, 2))
    wave = codec.decode_from_codebook_indices(codes)
    assert torch.equal(codec.decode_from_codebook_indices(codes.to(dtype)), wave)
    assert codec.decoder_stream().push(codes.to(dtype)).dtype == wave.dtype
