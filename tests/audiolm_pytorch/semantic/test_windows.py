import pytest
import torch
from torch import nn

from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.semantic.windows import ReceptiveField, Windows, features_in_windows
from tests.helpers.published_files import CONV_KERNELS, CONV_STRIDES, tiny_hubert


class BoundedEncoder(nn.Module):
    """Convolutions that make frames (reach 14, stride 6), then frames that see three neighbours on each side."""

    frames = ReceptiveField.of_convolutions((5, 4), (3, 2))
    reach_frames = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Sequential(nn.Conv1d(1, 8, 5, 3), nn.GELU(), nn.Conv1d(8, 8, 4, 2))
        self.body = nn.Conv1d(8, 8, 2 * self.reach_frames + 1, padding=self.reach_frames)
        self.longest = 0

    @torch.no_grad()
    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, wave.shape[1])
        return self.body(self.front(wave.unsqueeze(1))).transpose(1, 2)


@pytest.fixture(scope="module")
def encoder() -> BoundedEncoder:
    return BoundedEncoder().eval()


def test_convolutions_add_up_to_one_rule():
    """Guards the frame arithmetic: reach and stride of HuBERT's seven convolutions, and counts against real ones."""
    assert ReceptiveField.of_convolutions(CONV_KERNELS, CONV_STRIDES) == ReceptiveField(400, 320)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        kernels, strides = torch.randint(1, 6, (2, 3), generator=generator).tolist()
        rule = ReceptiveField.of_convolutions(kernels, strides)
        for num_samples in torch.randint(1, 120, (8,), generator=generator).tolist():
            left = num_samples
            for kernel, stride in zip(kernels, strides, strict=True):
                left = max(0, (left - kernel) // stride + 1)
            assert rule.num_frames(num_samples) == left
            if left:
                span = rule.span(0, left)
                assert 0 <= num_samples - span.stop < rule.stride and rule.num_frames(span.stop) == left


@pytest.mark.parametrize(("keep", "context"), [(10, 3), (10, 7), (1, 3), (37, 4), (1000, 0)])
def test_windows_give_the_whole(encoder, keep, context):
    """An encoder that sees no farther than the context must give the same in windows, whatever length is left over."""
    for num_samples in (14, 19, 20, 73, 74, 75, 200, 233, 500):
        wave = torch.randn(2, num_samples, generator=torch.Generator().manual_seed(num_samples))
        whole = encoder(wave)
        found = features_in_windows(encoder, wave, encoder.frames, Windows(keep, context))
        assert found.shape == whole.shape == (2, encoder.frames.num_frames(num_samples), 8)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_tokens_are_those_of_the_whole_away_from_the_seams(encoder):
    """With less context than the encoder sees, only frames within its reach of a seam may get other tokens."""
    wave = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1))
    whole = encoder(wave)[0]
    centroids = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(2))[:64]]
    keep = 20
    found = features_in_windows(encoder, wave, encoder.frames, Windows(keep, 0))[0]
    places = torch.arange(len(whole)) % keep
    away = (places >= encoder.reach_frames) & (places < keep - encoder.reach_frames)
    # what remains of the wave stands in the last, shorter window: its end is the end of the wave
    ids, expected = nearest_centroid(found, centroids), nearest_centroid(whole, centroids)
    assert len(ids) == len(expected) and torch.equal(ids[away], expected[away])
    assert not torch.equal(ids, expected), "without context the seams must show: else this test tests nothing"
    in_context = features_in_windows(encoder, wave, encoder.frames, Windows(keep, encoder.reach_frames))[0]
    assert torch.equal(nearest_centroid(in_context, centroids), expected)


def test_places_and_memory_do_not_depend_on_what_follows(encoder):
    """A longer wave has the same windows for its prefix, and no window exceeds its size."""
    wave = torch.randn(1, 6000, generator=torch.Generator().manual_seed(3))
    windows = Windows(30, 2)
    encoder.longest = 0
    long = features_in_windows(encoder, wave, encoder.frames, windows)
    assert encoder.longest == encoder.frames.span(0, 34).stop
    short = features_in_windows(encoder, wave[:, :2000], encoder.frames, windows)
    whole_windows = (short.shape[1] // 30 - 1) * 30
    assert whole_windows > 0 and torch.equal(short[:, :whole_windows], long[:, :whole_windows])


def test_windows_run_over_vectors_too(encoder):
    """Front ends that give vectors are windowed by the same rule, with a reach and a stride of one."""
    vectors = torch.randn(2, 75, 8, generator=torch.Generator().manual_seed(4))

    def body(part: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return encoder.body(part.transpose(1, 2)).transpose(1, 2)

    found = features_in_windows(body, vectors, ReceptiveField(), Windows(16, 3))
    torch.testing.assert_close(found, body(vectors), rtol=0, atol=1e-5)


def test_bad_numbers_are_refused():
    """A window that keeps nothing would loop for ever."""
    for arguments in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="keep >= 1"):
            Windows(*arguments)
    for arguments in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="positive"):
            ReceptiveField(*arguments)


def test_a_random_hubert_agrees_with_itself_in_windows():
    """Attention sees the whole wave, so windows are approximate there: most tokens must agree all the same."""
    from audiolm_pytorch.saving.hub import LoadedModel
    from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder

    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(6)
    loudness = torch.rand(1, 40, generator=generator) * torch.tensor([0.05, 1.0, 0.2, 0.02]).repeat_interleave(10)
    wave = torch.randn(1, 64_000, generator=generator).cumsum(dim=1).sin()
    wave *= 0.3 * loudness.repeat_interleave(1600, dim=1)
    model = tiny_hubert(num_layers=3)
    whole = TransformersEncoder(LoadedModel(model)).features(wave)[0][0]
    windowed = TransformersEncoder(LoadedModel(model), window_seconds=1.0, context_seconds=0.5).features(wave)[0][0]
    assert whole.shape == windowed.shape == (199, 16) and not torch.equal(whole, windowed)
    # 0.09 when this was written, 0.19 if the group norm is computed per window
    assert (windowed - whole).norm() < 0.14 * whole.norm()
    centroids = whole[torch.randperm(199, generator=generator)[:32]]
    agreement = (nearest_centroid(whole, centroids) == nearest_centroid(windowed, centroids)).float().mean().item()
    assert agreement > 0.5  # 0.63 when this was written; chance is 0.03
