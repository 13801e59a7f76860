import pytest
import torch

from audiolm_pytorch import nearest
from audiolm_pytorch.audio import resample
from audiolm_pytorch.io import load_module, save_module
from audiolm_pytorch.nearest import nearest_index
from audiolm_pytorch.semantic import BestRQEncoder, FrameEncoder, KMeansTokenizer, SemanticTokenizer, fit_kmeans
from audiolm_pytorch.semantic.frontend import length_mask

RATE_HZ = 4000
TOKEN_SAMPLES = 160


def tiny_encoder() -> BestRQEncoder:
    torch.manual_seed(0)
    return BestRQEncoder(
        dim=32, depth=2, heads=2, dim_head=16, sample_hz=RATE_HZ, num_mels=20, n_fft=256, hop_length=40
    ).eval()


def noises(num_waves: int, seed: int) -> list[torch.Tensor]:
    """Waves `[n]` whose loudness wanders, so that frames differ."""
    generator = torch.Generator().manual_seed(seed)
    loudness = [torch.rand(30, generator=generator).square().repeat_interleave(TOKEN_SAMPLES) for _ in range(num_waves)]
    return [gain * torch.randn(len(gain), generator=generator) for gain in loudness]


@pytest.fixture(scope="module")
def tokenizer() -> KMeansTokenizer:
    return fit_kmeans(tiny_encoder(), noises(8, 0), layer=2, num_clusters=16, seed=3).tokenizer


def test_fulfils_the_protocols(tokenizer):
    """Guards the contract that language models rely on: attributes, rates and the range of the ids."""
    assert isinstance(tokenizer, SemanticTokenizer) and isinstance(tokenizer.encoder, FrameEncoder)
    assert (tokenizer.target_sample_hz, tokenizer.downsample_factor, tokenizer.codebook_size) == (RATE_HZ, 160, 16)
    wave = torch.stack(noises(3, 1))
    ids = tokenizer(wave)
    assert ids.shape == (3, tokenizer.num_frames(wave.shape[1])) and ids.dtype == torch.int64
    assert 0 <= int(ids.min()) and int(ids.max()) < 16 and ids.unique().numel() > 4


def test_alone_equals_in_batch(tokenizer):
    """Guards padding: an item's ids are the same alone and in a batch, and -1 stands past its own end."""
    lengths = torch.tensor([4800, 1700, 160, 3201])
    wave = torch.stack(noises(4, 2))
    wave[~length_mask(lengths, 4800)] = 7.0
    ids = tokenizer(wave, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        count = tokenizer.num_frames(length)
        assert torch.equal(ids[row, :count], tokenizer(wave[row : row + 1, :length])[0])
        assert (ids[row, count:] == -1).all() and (ids[row, :count] >= 0).all()


def test_other_rates_are_resampled_item_by_item(tokenizer):
    """Guards resampling: the same as resampling first, counts that still cover the wave, no leak from the padding."""
    wave = torch.stack(noises(2, 4))
    lengths = torch.tensor([4800, 2411])
    wave[~length_mask(lengths, 4800)] = 7.0
    ids = tokenizer(wave, input_sample_hz=6000, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        item = resample(wave[row, :length], 6000, RATE_HZ)
        count = tokenizer.num_frames(len(item))
        assert torch.equal(ids[row, :count], tokenizer(item[None])[0]) and (ids[row, count:] == -1).all()
    assert torch.equal(tokenizer(wave, input_sample_hz=RATE_HZ), tokenizer(wave))


def test_ids_are_the_nearest_centroids(tokenizer, monkeypatch):
    """Guards the assignment against the definition, over more vectors than one chunk holds."""
    monkeypatch.setattr(nearest, "_ROWS_AT_ONCE", 1024)
    vectors = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    centroids = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_index(vectors, centroids), torch.cdist(vectors, centroids).argmin(dim=-1))
    wave = torch.stack(noises(1, 5))
    features, _ = tokenizer.encoder.features(wave, None, 2)
    normalised = (features[0] - tokenizer.mean) / tokenizer.std
    assert torch.equal(tokenizer(wave)[0], torch.cdist(normalised, tokenizer.centroids).argmin(dim=-1))


def test_fit_is_deterministic_and_reports_usage():
    """Guards the job: a seed fixes the centroids, whatever the global generator does; usage adds up."""
    torch.manual_seed(1)
    first = fit_kmeans(tiny_encoder(), noises(6, 0), layer=1, num_clusters=12, seed=0)
    torch.manual_seed(2)
    second = fit_kmeans(tiny_encoder(), noises(6, 0), layer=1, num_clusters=12, seed=0)
    other = fit_kmeans(tiny_encoder(), noises(6, 0), layer=1, num_clusters=12, seed=1)
    assert torch.equal(first.tokenizer.centroids, second.tokenizer.centroids) and first.usage == second.usage
    assert not torch.equal(first.tokenizer.centroids, other.tokenizer.centroids)
    usage = first.usage
    assert (usage.num_tokens, usage.num_clusters) == (180, 12)
    assert 1 <= usage.perplexity <= usage.used + 1e-6 <= 12 + 1e-6 and 0.2 < usage.explained < 1


def test_fit_normalises_each_dimension(tokenizer):
    """Guards the normalisation of AudioLM: over the fitted tokens every dimension has mean 0 and variance 1."""
    vectors = torch.cat([tokenizer.normalised_features(wave[None])[0][0] for wave in noises(8, 0)])
    torch.testing.assert_close(vectors.mean(dim=0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(vectors.std(dim=0, correction=0), torch.ones(32), atol=1e-3, rtol=0)


def test_fit_stops_at_max_tokens_and_leaves_the_encoder_alone():
    """Guards memory and side effects: an endless stream is read only as far as needed; the encoder keeps its mode."""
    encoder = tiny_encoder().train()

    def endless():
        while True:
            yield from noises(4, 0)

    fit = fit_kmeans(encoder, endless(), layer=1, num_clusters=4, max_tokens=100)
    assert fit.usage.num_tokens == 100
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    assert fit.tokenizer.encoder.depth == 1 and not any(p.requires_grad for p in fit.tokenizer.parameters())


def test_save_and_load_give_equal_ids(tokenizer, tmp_path):
    """Guards the saved form: the loaded tokenizer gives the same ids and has the same fingerprint."""
    save_module(tokenizer, tmp_path / "tokenizer")
    loaded = load_module(tmp_path / "tokenizer", KMeansTokenizer)
    wave = torch.stack(noises(2, 6))
    assert torch.equal(loaded(wave), tokenizer(wave)) and loaded.fingerprint == tokenizer.fingerprint


def test_fingerprint_follows_everything_that_makes_the_ids():
    """Guards stale token shards: other centroids, encoder weights or normalisation give another fingerprint."""
    fit = fit_kmeans(tiny_encoder(), noises(4, 0), layer=1, num_clusters=4)
    tokenizer = fit.tokenizer
    seen = [tokenizer.fingerprint]
    for part in (
        tokenizer.centroids,
        tokenizer.std,
        tokenizer.encoder.to_tokens.weight,
        tokenizer.encoder.front_end.mean,
    ):
        with torch.no_grad():
            part[..., 0] += 0.5
        seen.append(tokenizer.fingerprint)
    assert len(set(seen)) == 5 and tokenizer.fingerprint == seen[-1]


def test_stays_in_eval_mode_and_float32(tokenizer):
    """Guards constancy: neither train() of a container nor autocast changes how vectors are compared."""
    container = torch.nn.ModuleList([tokenizer]).train()
    assert container.training and not any(module.training for module in tokenizer.modules())
    vectors = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = nearest_index(vectors, tokenizer.centroids)
    assert torch.equal(under_autocast, nearest_index(vectors, tokenizer.centroids))


def test_bad_input_is_refused(tokenizer):
    """Guards the messages: shapes, short waves with the minimum, rates, lengths."""
    for wave, arguments, message in [
        (torch.zeros(1, 159), {}, "at least 160 samples"),
        (torch.zeros(800), {}, r"\[b, n\]"),
        (torch.zeros(1, 800), {"input_sample_hz": 0}, "input_sample_hz"),
        (torch.zeros(1, 800), {"input_sample_hz": 8000, "lengths": torch.tensor([801])}, "801"),
        (torch.zeros(1, 800), {"lengths": torch.tensor([100])}, "at least 160 samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer(wave, **arguments)


def test_bad_parts_are_refused():
    """Guards the constructor and the job: wrong encoders, layers, shapes, too few tokens, missing centroids."""
    encoder = tiny_encoder()
    with pytest.raises(TypeError, match="FrameEncoder"):
        KMeansTokenizer(encoder=torch.nn.Linear(2, 2), layer=1, num_clusters=4)
    for arguments, message in [
        ({"layer": 3, "num_clusters": 4}, r"0\.\.2"),
        ({"layer": 1}, "num_clusters"),
        ({"layer": 1, "num_clusters": 5, "centroids": torch.zeros(4, 32)}, "centroids"),
        ({"layer": 1, "centroids": torch.zeros(4, 31)}, "centroids"),
        ({"layer": 1, "centroids": torch.full((4, 32), torch.nan)}, "finite"),
        ({"layer": 1, "num_clusters": 4, "std": torch.zeros(32)}, "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            KMeansTokenizer(encoder=encoder, **arguments)
    with pytest.raises(RuntimeError, match="fit_kmeans"):
        KMeansTokenizer(encoder=encoder, layer=1, num_clusters=4)(torch.zeros(1, 800))
    with pytest.raises(ValueError, match="cannot fill 500"):
        fit_kmeans(encoder, noises(2, 0), layer=1, num_clusters=500)
    with pytest.raises(ValueError, match="at least one wave"):
        fit_kmeans(encoder, [], layer=1, num_clusters=2)
    with pytest.raises(ValueError, match="NaN"):
        fit_kmeans(encoder, [torch.full((800,), torch.nan)], layer=1, num_clusters=2)
