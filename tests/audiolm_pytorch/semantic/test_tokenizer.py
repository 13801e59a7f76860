import copy
from pathlib import Path

import pytest
import soundfile
import torch

from audiolm_pytorch.audio.padding import length_mask
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.nn import kmeans
from audiolm_pytorch.nn.kmeans import nearest_centroid
from audiolm_pytorch.saving.fingerprint import part_fingerprint
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import (
    BestRQEncoder,
    FrameEncoder,
    KMeansTokenizer,
    KMeansTrainer,
    SemanticTokenizer,
    tokenizer as module,
)

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


def fit_tokenizer(folder: Path, num_waves: int, **settings) -> KMeansTokenizer:
    """A tokenizer of the tiny encoder, fitted to noises."""
    (folder / "audio").mkdir(parents=True)
    for number, wave in enumerate(noises(num_waves, 0)):
        soundfile.write(folder / "audio" / f"{number}.wav", 0.1 * wave.numpy(), RATE_HZ, subtype="FLOAT")
    job = KMeansTrainer(encoder=tiny_encoder(), folder=folder / "audio", results_folder=folder / "run", **settings)
    return job.train().tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> KMeansTokenizer:
    return fit_tokenizer(tmp_path_factory.mktemp("tokenizer"), 8, layer=2, num_clusters=16, seed=3)


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
    monkeypatch.setattr(kmeans, "_MAX_ROWS", 1024)
    vectors = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    centroids = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_centroid(vectors, centroids), torch.cdist(vectors, centroids).argmin(dim=-1))
    wave = torch.stack(noises(1, 5))
    features, _ = tokenizer.encoder.features(wave, None, 2)
    normalised = (features[0] - tokenizer.mean) / tokenizer.std
    assert torch.equal(tokenizer(wave)[0], torch.cdist(normalised, tokenizer.centroids).argmin(dim=-1))


def test_long_waves_are_assigned_in_parts(tokenizer, monkeypatch):
    """Guards memory: normalising and comparing an hour at once would take several times its features."""
    wave = torch.stack(noises(2, 7))
    expected = tokenizer(wave)
    monkeypatch.setattr(module, "_FRAMES_PER_CHUNK", 7)
    assert torch.equal(tokenizer(wave), expected)


@pytest.mark.parametrize("multiple", [160, 1000])
def test_lengths_are_cut_to_whole_multiples(tokenizer, multiple, tmp_path):
    """`seq_len_multiple_of`: samples past the cut do not change the ids, alone or in a batch, and are not counted."""
    parts = dict(centroids=tokenizer.centroids, mean=tokenizer.mean, std=tokenizer.std)
    made = KMeansTokenizer(encoder=tokenizer.encoder, layer=2, seq_len_multiple_of=multiple, **parts)
    save_module(made, tmp_path / "tokenizer")
    cutting = load_module(tmp_path / "tokenizer", KMeansTokenizer)
    assert cutting.fingerprint() == made.fingerprint() != tokenizer.fingerprint()
    lengths = torch.tensor([4800, 4799, 2411, 1000])
    wave = torch.stack(noises(4, 8))
    wave[~length_mask(lengths, 4800)] = 7.0
    ids = cutting(wave, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        left = length // multiple * multiple
        count = cutting.num_frames(length)
        assert count == tokenizer.num_frames(left)
        assert (
            torch.equal(ids[row, :count], tokenizer(wave[row : row + 1, :left])[0]) and (ids[row, count:] == -1).all()
        )
    resampled = resample(wave[1, :2000], 6000, RATE_HZ)
    assert torch.equal(cutting(wave[1:2, :2000], input_sample_hz=6000), cutting(resampled[None]))


def test_save_and_load_give_equal_ids(tokenizer, tmp_path):
    """Guards the saved form: the loaded tokenizer gives the same ids and has the same fingerprint."""
    save_module(tokenizer, tmp_path / "tokenizer")
    loaded = load_module(tmp_path / "tokenizer", KMeansTokenizer)
    wave = torch.stack(noises(2, 6))
    assert torch.equal(loaded(wave), tokenizer(wave)) and loaded.fingerprint() == tokenizer.fingerprint()


@pytest.mark.slow
def test_fingerprint_follows_everything_that_makes_the_ids(tmp_path):
    """Guards stale token shards: other centroids, encoder weights or normalisation give another fingerprint."""
    tokenizer = fit_tokenizer(tmp_path, 4, layer=1, num_clusters=4)
    seen = [tokenizer.fingerprint()]
    for part in (
        tokenizer.centroids,
        tokenizer.std,
        tokenizer.encoder.to_tokens.weight,
        tokenizer.encoder.front_end.mean,
    ):
        with torch.no_grad():
            part[..., 0] += 0.5
        seen.append(tokenizer.fingerprint())
    assert len(set(seen)) == 5 and tokenizer.fingerprint() == seen[-1]


def test_an_encoder_may_say_who_it_is():
    """Encoders of others know better what identifies them: names of their weights change from release to release."""

    class Named(BestRQEncoder):
        def fingerprint(self):
            return "the published one"

    named = Named(**tiny_encoder().config)
    parts = dict(layer=1, centroids=torch.zeros(4, 32))
    assert part_fingerprint(named) == "the published one"
    first = KMeansTokenizer(encoder=named, **parts).fingerprint()
    assert first != KMeansTokenizer(encoder=tiny_encoder(), **parts).fingerprint()
    with torch.no_grad():
        named.to_tokens.weight.add_(1.0)
    assert KMeansTokenizer(encoder=named, **parts).fingerprint() == first


def test_stays_in_eval_mode_and_float32(tokenizer):
    """Guards constancy: neither train() of a container nor autocast changes how vectors are compared."""
    container = torch.nn.ModuleList([tokenizer]).train()
    assert container.training and not any(module.training for module in tokenizer.modules())
    vectors = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = nearest_centroid(vectors, tokenizer.centroids)
    assert torch.equal(under_autocast, nearest_centroid(vectors, tokenizer.centroids))


def test_bad_input_is_refused(tokenizer):
    """Guards the messages: shapes, short waves with the minimum, rates, lengths."""
    for wave, arguments, message in [
        (torch.zeros(1, 159), {}, "at least 160 samples"),
        (torch.zeros(1, 2, 800), {}, r"\[b, n\].*got shape \[1, 2, 800\]"),
        (torch.zeros(1, 800), {"input_sample_hz": 0}, "input_sample_hz"),
        (torch.zeros(1, 800), {"input_sample_hz": 8000, "lengths": torch.tensor([801])}, "801"),
        (torch.zeros(1, 800), {"lengths": torch.tensor([100])}, "at least 160 samples"),
        (torch.zeros(0, 800), {}, "not empty"),
        (torch.zeros(1, 800, dtype=torch.int16), {"input_sample_hz": 8000}, "must be a float tensor"),
        (torch.full((1, 800), torch.nan), {}, "NaN"),
        (torch.full((1, 800), torch.inf), {"input_sample_hz": 8000}, "NaN or infinite"),
        (torch.zeros(1, 800, device="meta"), {}, "wave is on meta, the model on cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenizer(wave, **arguments)
    with pytest.raises(TypeError, match="lengths"):
        tokenizer(torch.zeros(1, 800), lengths=[800])
    cutting = KMeansTokenizer(
        encoder=tokenizer.encoder, layer=2, centroids=tokenizer.centroids, seq_len_multiple_of=1000
    )
    with pytest.raises(ValueError, match="^a wave of 300 samples is cut to 0 samples, .*=1000: .*at least 160 samples"):
        cutting(torch.zeros(1, 300))


def test_padding_may_hold_anything(tokenizer):
    """NaN in the padding of an item does not change its ids."""
    waves = torch.stack(noises(2, 5))
    lengths = torch.tensor([waves.shape[1], 1000])
    expected = tokenizer(waves, lengths=lengths)
    waves[1, 1000:] = torch.nan
    assert torch.equal(tokenizer(waves, lengths=lengths), expected)


@pytest.mark.gpu
def test_ids_on_a_gpu_are_those_of_the_cpu(tokenizer):
    """Guards the assignment on another device, with lengths left on the CPU; ties may fall either way."""
    waves, lengths = torch.stack(noises(4, 6)), torch.tensor([4800, 4000, 4800, 161])
    expected = tokenizer(waves, lengths=lengths)
    found = copy.deepcopy(tokenizer).cuda()(waves.cuda(), lengths=lengths).cpu()
    assert (found == expected).float().mean() > 0.98


def test_bad_parts_are_refused():
    """Guards the constructor: wrong encoders, layers, shapes, missing centroids."""
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
        ({"layer": 1, "num_clusters": 4, "seq_len_multiple_of": 0}, "at least 1 sample"),
    ]:
        with pytest.raises(ValueError, match=message):
            KMeansTokenizer(encoder=encoder, **arguments)
    with pytest.raises(RuntimeError, match="KMeansTrainer"):
        KMeansTokenizer(encoder=encoder, layer=1, num_clusters=4)(torch.zeros(1, 800))
