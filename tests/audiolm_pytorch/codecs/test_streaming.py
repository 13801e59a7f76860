"""Causality, and streams that give what the whole recording gives."""

import random

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from audiolm_pytorch.codecs import SoundStream, SpectralSoundStream, StreamingCodec, convolutional, spectral
from audiolm_pytorch.codecs.convolutional import (
    CausalConv1d,
    CausalConvTranspose1d,
    ConvDecoder,
    ConvEncoder,
    ResidualUnit,
    elu,
)
from audiolm_pytorch.nn.film import FiLM
from audiolm_pytorch.nn.local_attention import LocalAttention, LocalTransformer
from audiolm_pytorch.nn.streaming import FrameStream, StreamState


def conv(**kwargs) -> SoundStream:
    sizes = dict(codebook_size=16, rq_num_quantizers=3, codebook_dim=8, channels=4, strides=(2, 4))
    return SoundStream(**{**sizes, **kwargs}).eval()


def spectral_codec(**kwargs) -> SoundStream:
    sizes = dict(dim=16, encoder_depth=1, decoder_depth=1, hop_samples=16, codebook_size=16, code_dim=4)
    return SpectralSoundStream(**{**sizes, **kwargs}).eval()


CODECS = {
    "conv": conv,
    "attention": lambda: conv(attn_window_size=5, attn_depth=2),
    "stereo attention": lambda: conv(audio_channels=2, attn_window_size=5, attn_depth=1),
    "spectral": spectral_codec,
    "spectral stereo": lambda: spectral_codec(audio_channels=2),
    "groups": lambda: conv(rq_groups=2, attn_window_size=4, attn_depth=1),
}
each_codec = pytest.mark.parametrize("kind", CODECS)
causal_codec = pytest.mark.parametrize("kind", ["conv", "attention", "stereo attention"])


def random_parts(x: torch.Tensor, dim: int, largest: int) -> list[torch.Tensor]:
    """Cut at random places; some parts are empty."""
    sizes, left = [], x.shape[dim]
    while left:
        sizes.append(min(left, random.randint(0, largest)))
        left -= sizes[-1]
    return list(x.split(sizes, dim=dim))


# --- causality --------------------------------------------------------------------------------------------------------


@causal_codec
def test_no_output_depends_on_the_future(kind):
    """Changes after a frame do not affect it or earlier frames, in inference and in training."""
    codec = CODECS[kind]()
    wave = torch.randn(1, codec.channels, 320)
    changed = torch.cat([wave[..., :160], torch.randn_like(wave[..., 160:])], dim=-1)
    frames = torch.randn(1, 40, 8)
    late = torch.cat([frames[:, :20], torch.randn_like(frames[:, 20:])], dim=1)
    for has_grad in (False, True):
        with torch.set_grad_enabled(has_grad):
            before, after = codec.encoder(wave), codec.encoder(changed)
            torch.testing.assert_close(before[:, :20], after[:, :20], rtol=0, atol=1e-6)
            assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)
            torch.testing.assert_close(codec.decoder(frames)[..., :160], codec.decoder(late)[..., :160])


@causal_codec
def test_no_gradient_reaches_the_future(kind):
    """The gradient of a frame ends at its last sample, that of a frame's samples at the frame."""
    codec = CODECS[kind]()
    wave = torch.randn(1, codec.channels, 320, requires_grad=True)
    codec.encoder(wave)[:, 20].sum().backward()
    assert (wave.grad[..., 168:] == 0).all()
    assert (wave.grad[..., 167] != 0).all()
    frames = torch.randn(1, 40, 8, requires_grad=True)
    codec.decoder(frames)[..., 160:168].sum().backward()
    assert (frames.grad[:, 21:] == 0).all()
    assert (frames.grad[:, 20] != 0).any()


def test_lookahead_of_the_spectral_pair():
    """Later input than the look-ahead has no effect; the last frame of the look-ahead has one."""
    codec = spectral_codec()
    hop, frame, reach = 16, 30, codec.encoder.lookahead_frames
    wave, frames = torch.randn(1, 1, hop * 60), torch.randn(1, 60, 16)
    with torch.no_grad():
        for beyond, is_enough in ((reach + 1, True), (reach, False)):
            changed = wave.clone()
            changed[..., (frame + beyond) * hop :] += 1
            difference = (codec.encoder(changed) - codec.encoder(wave))[:, frame].abs().max()
            assert (difference < 1e-5) == is_enough
        reach = codec.decoder.lookahead_frames
        for beyond, is_enough in ((reach + 1, True), (reach, False)):
            changed = frames.clone()
            changed[:, frame + beyond :] += 1
            difference = codec.decoder(changed) - codec.decoder(frames)
            assert (difference[..., : (frame + 1) * hop].abs().max() < 1e-5) == is_enough


# --- layers against torch's own ---------------------------------------------------------------------------------------


def as_row(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b d n -> b d 1 n")


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [(7, 1, 1), (7, 1, 9), (6, 3, 1), (1, 1, 1), (3, 1, 2)])
def test_causal_convolution_is_conv1d_with_left_padding(kernel_size, stride, dilation):
    """Compared with conv1d; chunks of whole strides with a state have the same result."""
    layer = CausalConv1d(3, 5, kernel_size, stride=stride, dilation=dilation)
    x = torch.randn(2, 3, 60)
    padded = F.pad(x, (dilation * (kernel_size - 1) + 1 - stride, 0))
    expected = F.conv1d(padded, layer.conv.weight[:, :, 0], layer.conv.bias, stride=stride, dilation=dilation)
    torch.testing.assert_close(layer(as_row(x))[:, :, 0], expected)
    state = StreamState()
    parts = [layer(as_row(part), state) for part in x.split([3, 6, 30, 21], dim=-1)]
    torch.testing.assert_close(torch.cat(parts, dim=-1)[:, :, 0], expected)


@pytest.mark.parametrize("stride", [2, 5])
def test_transposed_convolution_is_conv_transpose1d_without_its_end(stride):
    """Compared with conv_transpose1d of kernel 2 * stride with the same weights."""
    layer = CausalConvTranspose1d(3, 4, stride)
    weight = layer.to_steps.conv.weight  # [(s d'), d, 1, 2]: what an output takes from the step before and its own
    nn.init.zeros_(layer.to_steps.conv.bias)
    taps = rearrange(weight, "(s o) i 1 two -> two i o s", s=stride)
    x = torch.randn(2, 3, 20)
    expected = F.conv_transpose1d(x, torch.cat([taps[1], taps[0]], dim=-1), stride=stride)[..., : 20 * stride]
    torch.testing.assert_close(layer(as_row(x))[:, :, 0], expected)
    state = StreamState()
    parts = [layer(as_row(part), state) for part in x.split([1, 4, 15], dim=-1)]
    torch.testing.assert_close(torch.cat(parts, dim=-1)[:, :, 0], expected)


def test_inference_does_not_overwrite_the_input_of_a_residual_unit():
    """In-place operations never change the caller's tensor."""
    unit, x = ResidualUnit(4, dilation=3), as_row(torch.randn(1, 4, 50))
    before = x.clone()
    expected = unit(x)
    with torch.no_grad():
        torch.testing.assert_close(unit(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, before)


def test_fast_elu_is_elu():
    """The faster formula of inference, over all magnitudes and for NaN."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 1e30, -1e30])])
    with torch.no_grad():
        torch.testing.assert_close(elu(x), F.elu(x), rtol=1e-6, atol=2e-7)
        assert elu(torch.tensor([float("nan")])).isnan()
        y = x.clone()
        assert elu(y, overwrite=True).data_ptr() == y.data_ptr()


def test_local_attention_is_banded_attention():
    """Compared with attention over the full matrix with absolute positions."""
    attention = LocalAttention(32, window=6, heads=2)
    x = torch.randn(2, 40, 32)
    queries, keys, values = rearrange(attention.to_qkv(x), "b f (three h d) -> three b h f d", three=3, h=2)
    angle = torch.arange(1000, 1040)[:, None] * 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(y):
        return torch.view_as_real(torch.complex(y[..., :32], y[..., 32:]) * turn)

    scores = torch.einsum("b h i d r, b h j d r -> b h i j", turned(queries), turned(keys)) / 64**0.5
    distance = torch.arange(40)[:, None] - torch.arange(40)
    scores = scores.masked_fill((distance < 0) | (distance >= 6), float("-inf"))
    expected = attention.to_out(rearrange(scores.softmax(-1) @ values, "b h f d -> b f (h d)"))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 50])
def test_local_attention_streams(window):
    """Frames may come one by one or in larger chunks; the state holds at most the window."""
    transformer = LocalTransformer(16, depth=2, window=window)
    x, state = torch.randn(2, 45, 16), StreamState()
    parts = [transformer(part, state) for part in random_parts(x, 1, 9) if part.shape[1]]
    torch.testing.assert_close(torch.cat(parts, dim=1), transformer(x), rtol=1e-4, atol=1e-5)
    assert all(past.shape[3] <= window - 1 for past in state._pasts.values())


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_codec
def test_streams_equal_the_whole(kind):
    """Any chunking of a batch of two, with two alternating streams of one codec: codes equal, waves to 1e-5."""
    codec = CODECS[kind]()
    assert isinstance(codec, StreamingCodec)
    waves = [torch.randn(2, codec.channels, n) for n in (203, 264)]
    for largest in (4, 30, 250):
        codes = []
        streams = [codec.encoder_stream() for _ in waves]
        queues = [random_parts(wave, -1, largest) for wave in waves]
        outputs: list[list[torch.Tensor]] = [[], []]
        while any(queues):
            which = random.choice([i for i in (0, 1) if queues[i]])
            outputs[which].append(streams[which].push(queues[which].pop(0)))
        for wave, stream, output in zip(waves, streams, outputs):
            codes.append(torch.cat([*output, stream.finish()], dim=1))
            assert torch.equal(codes[-1], codec.tokenize(wave))
        decoders = [codec.decoder_stream() for _ in codes]
        parts = [[stream.push(part) for part in random_parts(c, 1, largest)] for stream, c in zip(decoders, codes)]
        for code, stream, part in zip(codes, decoders, parts):
            wave = torch.cat([*part, stream.finish()], dim=-1)
            torch.testing.assert_close(wave, codec.decode_from_codebook_indices(code), rtol=0, atol=1e-5)


@pytest.mark.slow
@each_codec
def test_latency(kind):
    """A code is returned when its frame and the look-ahead are complete, a wave when its codes are."""
    codec = CODECS[kind]()
    factor, rate_hz = codec.downsample_factor, codec.target_sample_hz
    wave = torch.randn(1, codec.channels, 30 * factor)
    stream, pushed, given = codec.encoder_stream(), 0, 0
    latency_samples = round(codec.encoder_latency_seconds * rate_hz)
    for part in random_parts(wave, -1, 11):
        pushed += part.shape[-1]
        given += stream.push(part).shape[1]
        # frame k begins at sample k * factor
        assert given == max(0, (pushed - latency_samples) // factor + 1)
    decoder, codes = codec.decoder_stream(), codec.tokenize(wave)
    num_samples = [decoder.push(code).shape[-1] for code in codes.split(1, dim=1)]
    waits = round(codec.decoder_latency_seconds * rate_hz / factor)
    assert num_samples == [0] * waits + [factor] * (30 - waits)
    assert decoder.finish().shape[-1] == waits * factor


def test_causal_codec_has_the_latency_of_a_frame():
    """20 ms at 50 frames a second, and none at all in the decoder."""
    codec = SoundStream(channels=2, codebook_dim=4, strides=(2, 4, 5, 8))
    assert (codec.encoder_latency_seconds, codec.decoder_latency_seconds) == (0.02, 0.0)


def test_a_stream_denoises_like_the_whole():
    """A stream has one denoising flag per item."""
    codec = conv(denoising=FiLM(dim=8))
    nn.init.normal_(codec.denoising.table)
    wave, flags = torch.randn(2, 1, 400), torch.tensor([True, False])
    stream = codec.encoder_stream(denoise=flags)
    codes = torch.cat([stream.push(wave[..., :133]), stream.push(wave[..., 133:]), stream.finish()], dim=1)
    assert torch.equal(codes, codec.tokenize(wave, denoise=flags))
    assert torch.equal(codes[:1], codec.tokenize(wave[:1], denoise=True))
    assert torch.equal(codes[1:], codec.tokenize(wave[1:]))
    assert not torch.equal(codes[:1], codec.tokenize(wave[:1]))


def test_misused_streams_raise():
    """Nothing pushed, pushed after the end, another batch size, bad audio or codes."""
    codec = conv()
    with pytest.raises(ValueError, match="received no input"):
        codec.encoder_stream().finish()
    stream = codec.encoder_stream()
    stream.push(torch.randn(1, 10))
    with pytest.raises(ValueError, match="all chunks of a stream need the shape"):
        stream.push(torch.randn(2, 10))
    with pytest.raises(ValueError, match="NaN"):
        stream.push(torch.full((1, 10), float("nan")))
    assert stream.finish().shape == (1, 1, 3)
    with pytest.raises(ValueError, match="finished"):
        stream.push(torch.randn(1, 10))
    with pytest.raises(ValueError, match="0..15"):
        codec.decoder_stream().push(torch.full((1, 2, 3), 99))


# --- long recordings --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_codec
def test_long_recordings_run_in_chunks(kind, monkeypatch):
    """Chunks have equal codes and samples, also for padded items; a long recording in one run would need gigabytes."""
    codec = CODECS[kind]()
    factor = codec.downsample_factor
    wave, lengths = torch.randn(2, codec.channels, factor * 201 - 3), torch.tensor([factor * 201 - 3, factor * 110 - 5])
    codes = codec.tokenize(wave, lengths)
    sound = codec.decode_from_codebook_indices(codes[:1])
    masked = F.pad(wave, (0, 3)), codes[..., 0] >= 0
    with torch.no_grad():
        frames = codec.encoder(*masked)
    sizes = []
    for cls, method in ((type(codec.encoder), "_encode"), (type(codec.decoder), "_decode")):
        original = getattr(cls, method)

        def counted(self, x, *args, original=original):
            sizes.append(max(x.shape[1:]))
            return original(self, x, *args)

        monkeypatch.setattr(cls, method, counted)
    monkeypatch.setattr(spectral, "_CHUNK_FRAMES", 20)
    monkeypatch.setattr(convolutional, "_CHUNK_SAMPLES_CPU", 20 * factor)
    assert torch.equal(codec.tokenize(wave, lengths), codes)
    assert len(sizes) > 2 and max(sizes) < 100 * factor
    sizes.clear()
    torch.testing.assert_close(codec.decode_from_codebook_indices(codes[:1]), sound, atol=1e-5, rtol=0)
    assert len(sizes) > 2 and max(sizes) < 100
    with torch.no_grad():
        torch.testing.assert_close(codec.encoder(*masked), frames, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            codec(wave[:1], return_recons_only=True), sound[..., : wave.shape[-1]], atol=1e-5, rtol=0
        )


@pytest.mark.slow
def test_a_stream_keeps_no_more_than_it_needs():
    """Memory does not grow with the stream: state and pending samples are small and own their storage."""
    encoder = ConvEncoder(base_dim=4, strides=(2, 4), dim=8, attn_window_size=6, attn_depth=1)
    state = StreamState()
    with torch.no_grad():
        for _ in range(3):
            encoder._encode(torch.randn(1, 1, 4000), None, state)
    held = sum(past.untyped_storage().nbytes() for past in state._pasts.values())
    assert held < 4 * 6000
    stream = encoder.stream()
    stream.push(torch.randn(1, 1, 40_003))
    assert stream._pending.untyped_storage().nbytes() == 4 * 3


def test_a_chunked_network_receives_position_and_context():
    """Position and context of every chunk are those of the whole; this network depends on two frames on either side."""
    x = torch.randn(1, 100, 3)
    firsts = []

    def run(chunk, first_frame):
        firsts.append(first_frame)
        assert torch.equal(chunk, x[:, first_frame : first_frame + chunk.shape[1]])
        return F.conv1d(chunk.mT, torch.ones(3, 1, 5), padding=2, groups=3).mT

    stream = FrameStream(
        run, in_axis=1, in_steps=1, out_axis=1, out_steps=1, out_width=3, reach_frames=2, budget_frames=7
    )
    parts = [stream.push(part) for part in random_parts(x, 1, 5)]
    whole = F.conv1d(x.mT, torch.ones(3, 1, 5), padding=2, groups=3).mT
    torch.testing.assert_close(torch.cat([*parts, stream.finish()], dim=1), whole)
    assert firsts[-1] > 80


def test_default_decoder_mirrors_the_default_encoder():
    """n samples become frames and n samples again."""
    frames = ConvEncoder(base_dim=2, dim=4)(torch.randn(1, 1, 640))
    assert frames.shape == (1, 2, 4)
    assert ConvDecoder(base_dim=2, dim=4)(frames).shape == (1, 1, 640)
