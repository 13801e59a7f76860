import math

import pytest
import torch
from torch.nn import functional as F

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import SemanticTokenizer
from audiolm_pytorch.semantic.pretrained import vq_wav2vec
from audiolm_pytorch.semantic.pretrained.vq_wav2vec import FairseqVQWav2Vec
from tests.helpers.published_vq_wav2vec import CODES, WIDTH, naive_codes, vq_settings, vq_state, write_vq_wav2vec
from tests.helpers.quick import only_quick

REACH, STRIDE = 465, 160
VARIANTS = {
    "published gumbel": {},
    "published k-means": dict(vq_type="kmeans"),
    "gumbel, codebooks apart, one layer": dict(combine_groups=False, vq_depth=1),
    "gumbel, three layers, no compression": dict(vq_depth=3, log_compression=False),
    "gumbel, relu, four groups": dict(activation="relu", vq_groups=4),
    "k-means, codebooks apart": dict(vq_type="kmeans", combine_groups=False, vq_groups=4),
}


def sounds(num_items, num_samples, seed=0):
    """Waves `[b, n]` of changing loudness and pitch, so that codes differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num_items, 2, num_samples // 1000 + 2, generator=generator)
    loudness, pitch = F.interpolate(coarse, size=num_samples, mode="linear").unbind(dim=1)
    noise = torch.randn(num_items, num_samples, generator=generator)
    return loudness * (torch.sin(torch.cumsum(0.02 + 0.3 * pitch, dim=1)) + 0.3 * noise)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A function that writes a checkpoint with changed settings and returns its path."""
    folder = tmp_path_factory.mktemp("published")

    def write(**changes):
        path = folder / f"{'-'.join(f'{name}={value}' for name, value in changes.items()) or 'published'}.pt"
        return path if path.exists() else write_vq_wav2vec(path, vq_settings(**changes))

    return write


@pytest.fixture(scope="module", params=["gumbel", "kmeans"])
def tokenizer(request, files):
    return FairseqVQWav2Vec(files(vq_type=request.param))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_codes_are_those_of_the_formulas(files, changes):
    """Guards network and key map: ids equal those of a second computation in float64, vectors agree to 1e-5."""
    settings = vq_settings(**changes)
    tokenizer = FairseqVQWav2Vec(files(**changes))
    wave = sounds(1, 10_000)
    codes, vectors = naive_codes(vq_state(settings), settings, wave[0])
    torch.testing.assert_close(tokenizer.network.vectors(wave)[0], vectors.float(), atol=1e-5, rtol=1e-5)
    groups = settings["vq_groups"]
    expected = [code + group * CODES for frame in codes.tolist() for group, code in enumerate(frame)]
    ids = tokenizer(wave)
    assert ids.tolist() == [expected] and ids.dtype == torch.int64
    assert len(set(expected)) > 2.5 * groups
    assert (tokenizer.codebook_size, tokenizer.downsample_factor) == (groups * CODES, STRIDE // groups)


@pytest.mark.parametrize("form", [dict(legacy=False), dict(cfg=True), dict(cfg=True, legacy=False)])
def test_later_layouts_hold_the_same_model(files, tmp_path, form):
    """Guards the reader: settings in `cfg`, and torch's zip format, give the very same tokenizer."""
    path = write_vq_wav2vec(tmp_path / "other.pt", vq_settings(), **form)
    assert FairseqVQWav2Vec(path).fingerprint() == FairseqVQWav2Vec(files()).fingerprint()


def test_fulfils_the_protocol_and_the_published_example(tokenizer):
    """Guards the contract, and the count in fairseq's README: 10000 samples give 60 frames of 2 codes."""
    assert isinstance(tokenizer, SemanticTokenizer)
    assert tokenizer.target_sample_hz == 16_000 and tokenizer.num_frames(10_000) == 120
    ids = tokenizer(sounds(2, 10_000, seed=1))
    assert ids.shape == (2, 120)
    assert ((ids[:, ::2] >= 0) & (ids[:, ::2] < CODES)).all() and (ids[:, 1::2] >= CODES).all()
    assert int(ids.max()) < tokenizer.codebook_size == 2 * CODES


@pytest.mark.slow
def test_num_frames_is_exact(tokenizer):
    """Guards the frame arithmetic: the closed form, the method and the ids agree for 200 random lengths."""
    generator = torch.Generator().manual_seed(0)
    for length in [REACH, *torch.randint(REACH, 4000, (200,), generator=generator).tolist()]:
        expected = ((length - REACH) // STRIDE + 1) * 2
        assert tokenizer.num_frames(length) == expected == tokenizer(torch.randn(1, length)).shape[1]


def test_alone_equals_in_batch(tokenizer):
    """Guards padding: the norms use the whole item and nothing behind its end."""
    lengths = torch.tensor([6000, REACH, 3333, 6000])
    wave = sounds(4, 6000, seed=2)
    wave[torch.arange(6000) >= lengths[:, None]] = 7.0
    ids = tokenizer(wave, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        count = tokenizer.num_frames(length)
        assert torch.equal(ids[row, :count], tokenizer(wave[row : row + 1, :length])[0])
        assert (ids[row, count:] == -1).all()


def test_lengths_are_cut_to_multiples(files):
    """Guards `seq_len_multiple_of`: the ids are those of the wave cut by hand, also for items in a batch."""
    whole, cut = FairseqVQWav2Vec(files()), FairseqVQWav2Vec(files(), seq_len_multiple_of=1000)
    wave, lengths = sounds(2, 5678, seed=3), torch.tensor([5678, 2999])
    ids = cut(wave, lengths=lengths)
    assert torch.equal(ids[0], whole(wave[:1, :5000])[0])
    count = cut.num_frames(2999)
    assert count == whole.num_frames(2000) and (ids[1, count:] == -1).all()
    assert torch.equal(ids[1, :count], whole(wave[1:, :2000])[0])
    assert cut.fingerprint() != whole.fingerprint()


def test_other_rates_are_resampled_item_by_item(tokenizer):
    """Guards resampling: the same as resampling first, and no leak from the padding."""
    wave, lengths = sounds(2, 4800, seed=4), torch.tensor([4800, 2411])
    wave[1, 2411:] = 7.0
    ids = tokenizer(wave, input_sample_hz=12_000, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        item = resample(wave[row, :length], 12_000, 16_000)
        count = tokenizer.num_frames(len(item))
        assert torch.equal(ids[row, :count], tokenizer(item[None])[0]) and (ids[row, count:] == -1).all()


@pytest.mark.parametrize("samples_at_once", only_quick([2000, 12_000], [12_000]), ids=["20 parts", "4 parts"])
@pytest.mark.parametrize("changes", [{}, dict(vq_type="kmeans")])
def test_long_waves_have_no_seams(files, changes, samples_at_once, monkeypatch):
    """Guards long files: vectors and ids in chunks equal those of the whole wave."""
    tokenizer = FairseqVQWav2Vec(files(**changes))
    wave = sounds(2, 40_000, seed=5)
    whole, ids = tokenizer.network.vectors(wave), tokenizer(wave)
    monkeypatch.setattr(vq_wav2vec, "_SAMPLES_PER_CHUNK", samples_at_once)
    parts = tokenizer.network.vectors(wave)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=2e-5)
    assert not torch.equal(parts, whole), "the parts were not used"
    assert (tokenizer(wave) != ids).float().mean() < 1e-3


def test_save_and_load_need_no_checkpoint(tokenizer, tmp_path):
    """Guards the saved form: a folder of safetensors gives the same ids and fingerprint, and only needed weights."""
    save_module(tokenizer, tmp_path / "tokenizer")
    loaded = load_module(tmp_path / "tokenizer", FairseqVQWav2Vec)
    wave = sounds(1, 4000, seed=6)
    assert torch.equal(loaded(wave), tokenizer(wave)) and loaded.fingerprint() == tokenizer.fingerprint()
    assert not any(name.startswith(("feature_aggregator", "wav2vec")) for name in loaded.network.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_fingerprint_follows_what_makes_the_ids(files, tmp_path):
    """Guards stale shards: any used weight or setting changes the fingerprint, unused weights do not."""
    first = FairseqVQWav2Vec(files()).fingerprint()
    seen = {first}
    for name in ("feature_extractor.conv_layers.3.2.bias", "vector_quantizer.weight_proj.1.weight"):
        state = vq_state(vq_settings())
        state[name] = state[name] + 0.1
        seen.add(FairseqVQWav2Vec(write_vq_wav2vec(tmp_path / "w.pt", vq_settings(), state=state)).fingerprint())
    for changes in (dict(log_compression=False), dict(activation="relu")):
        seen.add(FairseqVQWav2Vec(write_vq_wav2vec(tmp_path / "s.pt", vq_settings(**changes))).fingerprint())
    assert len(seen) == 5
    state = vq_state(vq_settings())
    for name in ("vector_quantizer.vars", "feature_aggregator.conv_layers.0.1.bias"):
        state[name] = state[name] + 0.1
    same = FairseqVQWav2Vec(write_vq_wav2vec(tmp_path / "same.pt", vq_settings(), state=state))
    assert same.fingerprint() == first


def test_stays_in_eval_mode_and_takes_no_random_numbers(files):
    """The train() of a container and autocast do not change the ids; loading does not use random numbers."""
    torch.manual_seed(3)
    tokenizer = FairseqVQWav2Vec(files())
    number = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(number, torch.rand(1))
    container = torch.nn.ModuleList([tokenizer]).train()
    assert container.training and not any(module.training for module in tokenizer.modules())
    wave = sounds(1, 4000, seed=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer(wave), tokenizer(wave.double()))


def faulty(files, tmp_path, case):
    """A call that must fail."""
    state, settings, path = vq_state(vq_settings()), vq_settings(), tmp_path / "faulty.pt"
    match case:
        case "missing":
            return lambda: FairseqVQWav2Vec(tmp_path / "nowhere.pt")
        case "truncated":
            data = files().read_bytes()
            path.write_bytes(data[: len(data) // 2])
            return lambda: FairseqVQWav2Vec(path)
        case "rate":
            return lambda: FairseqVQWav2Vec(files(), target_sample_hz=24_000)
        case "input rate":
            return lambda: FairseqVQWav2Vec(files())(torch.randn(1, 4000), input_sample_hz=0)
        case "multiple":
            return lambda: FairseqVQWav2Vec(files(), seq_len_multiple_of=0)
        case "short":
            return lambda: FairseqVQWav2Vec(files())(torch.randn(1, REACH - 1))
        case "short item":
            return lambda: FairseqVQWav2Vec(files())(torch.randn(2, 4000), lengths=torch.tensor([4000, 400]))
        case "cut short":
            return lambda: FairseqVQWav2Vec(files(), seq_len_multiple_of=1000)(torch.randn(1, 999))
        case "shape":
            return lambda: FairseqVQWav2Vec(files())(torch.randn(1, 2, 4000))
        case "infinite":
            return lambda: FairseqVQWav2Vec(files())(torch.full((1, 4000), torch.nan))
        case "no quantizer":
            state = {name: tensor for name, tensor in state.items() if not name.startswith("vector_quantizer")}
        case "lacking":
            del state["feature_extractor.conv_layers.2.2.bias"]
        case "unknown":
            state["feature_extractor.mystery"] = torch.zeros(3)
        case "other layers":
            settings["conv_feature_layers"] = "[(999999, 999999, 5)] + [(16, 8, 4)] * 7"
        case "other input":  # all convolutions are of one width and read another one
            settings["conv_feature_layers"] = "[(2000, 1, 1)] * 2"
            for place in range(2):
                state[f"feature_extractor.conv_layers.{place}.0.weight"] = torch.ones(2000, 1, 1)
        case "large quantizer" | "deep quantizer":
            settings["conv_feature_layers"] = "[(2000, 1, 1)]"
            state = {name: tensor for name, tensor in state.items() if name.startswith("vector")}
            state["feature_extractor.conv_layers.0.0.weight"] = torch.ones(2000, 1, 1)
            if case == "deep quantizer":
                state |= {f"vector_quantizer.weight_proj.{n}.0.bias": torch.ones(8) for n in range(100)}
        case "program":
            settings["conv_feature_layers"] = "__import__('os').system('true')"
        case "no log":
            del settings["log_compression"]
        case "odd activation":
            settings["activation"] = "swish"
        case "skip connections":
            settings["skip_connections_feat"] = True
        case "groups":
            settings["vq_groups"] = 7
    write_vq_wav2vec(path, settings, state=state)
    return lambda: FairseqVQWav2Vec(path)


CASES = {
    "missing": "nowhere.pt cannot be read",
    "truncated": "damaged.*again",
    "rate": "needs 16000 Hz.*target_sample_hz=16000, and input_sample_hz=24000",
    "input rate": "input_sample_hz must be in 1000",
    "multiple": "at least 1",
    "short": "464 samples is too short.*465 samples.*pass a longer wave",
    "short item": "400 samples is too short",
    "cut short": "999 samples is too short.*multiples of 1000",
    "shape": "mix the channels down",
    "infinite": "nan_to_num",
    "no quantizer": "has no vq-wav2vec.*pass vq-wav2vec.pt",
    "lacking": "missing: features.layers.2.norm.bias",
    "unknown": "not known to the module: feature_extractor.mystery",
    "other layers": "settings need a model of",
    "other input": "settings need a model of",
    "large quantizer": "settings need a model of",
    "deep quantizer": "settings need a model of",
    "program": "conv_feature_layers.*cannot be parsed",
    "no log": "log_compression .* unsupported value 'None'",
    "odd activation": "activation .* unsupported value 'swish'",
    "skip connections": "skip_connections_feat .* unsupported value 'True'",
    "groups": "24 logits cannot be divided into 7",
}


@pytest.mark.parametrize("case", CASES)
def test_errors_are_one_line_with_the_mend(files, tmp_path, case):
    """Errors are one line with what was passed and what is needed."""
    with pytest.raises(ValueError, match=CASES[case]) as error:
        faulty(files, tmp_path, case)()
    assert "\n" not in str(error.value)


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("place", ["args", "state"])
def test_hostile_files_are_refused_and_run_nothing(tmp_path, place):
    """A call in the settings or among the weights is refused and does not run."""
    ran = tmp_path / "ran"
    settings, state = vq_settings(), vq_state(vq_settings())
    (settings if place == "args" else state)["payload"] = Attack(ran)
    path = write_vq_wav2vec(tmp_path / "hostile.pt", settings, state=state)
    with pytest.raises(ValueError, match="system.*nothing of it was run"):
        FairseqVQWav2Vec(path)
    assert not ran.exists()


def test_receptive_field_is_the_published_one(tokenizer):
    """The receptive field has the published reach and stride."""
    frames = tokenizer.network.frames
    assert (frames.reach, frames.stride) == (REACH, STRIDE)
    assert math.prod(layer.stride for layer in tokenizer.network.features.layers) == STRIDE
    assert tokenizer.network.features.dim == WIDTH
