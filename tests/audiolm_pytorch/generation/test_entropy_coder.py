"""Entropy-coded codes are decoded bit for bit, have nearly the ideal length, and damaged ones raise an error."""

import math

import pytest
import torch

from audiolm_pytorch.codecs.code_file import read_codes, write_codes
from audiolm_pytorch.codecs.transcode import FileCodec
from audiolm_pytorch.generation.entropy_coder import EntropyCoder
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.lm.trainers import EntropyTransformerTrainer
from audiolm_pytorch.saving.modules import load_module
from tests.helpers.fakes import FakeCodec, memorise

pytest.importorskip("constriction")
pytestmark = pytest.mark.usefixtures("low_rates")
SIZES = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}


def entropy_model(scale=1.0, seed=0, **changes):
    """A tiny model of 4 levels of 16 codes, with random weights; windows have 20 frames."""
    torch.manual_seed(seed)
    model = EntropyTransformer(**{**SIZES, "codebook_size": 16, "num_quantizers": 4, "max_seconds": 0.4, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


def num_bits(coded):
    return 8 * sum(tensor.nbytes for tensor in coded.values())


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 2},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"pattern": "parallel"}, {"positions": "none"})),
    ],
)
def test_decoded_codes_equal_the_encoded_codes(options):
    """For lengths around the borders of windows, fewer levels, and predictions far from uniform."""
    coder = EntropyCoder(entropy_model(scale=6.0, **options))
    for num_frames in (1, 2, 10, 11, 20, 21, 45):
        for num_levels in (2, 4):
            codes = torch.randint(16, (num_frames, num_levels))
            coded = coder.encode(codes)
            assert torch.equal(coder.decode(coded, num_frames, num_levels), codes)


@pytest.mark.slow
def test_other_numbers_of_threads_and_a_changed_global_state_decode_the_same():
    """A file is decoded in another process than it was encoded in; the global random generator is left alone."""
    codes, threads = torch.randint(16, (45, 4)), torch.get_num_threads()
    coded = EntropyCoder(entropy_model(scale=6.0)).encode(codes)
    decoder, state = EntropyCoder(entropy_model(scale=6.0).train()), torch.get_rng_state()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(decoder.decode(coded, 45, 4), codes)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_length_is_that_of_the_model():
    """The bits are within 1 % of the cross-entropy of the model, plus checksums and the last word of the coder."""
    model = entropy_model(scale=6.0, max_seconds=20.0, rate_hz=50)
    codes = torch.randint(16, (256, 4))  # one window
    with torch.no_grad():
        loss = model(model.layout.pack({"codes": codes[None]})).loss
    ideal = float(loss) * codes.numel() / math.log(2)
    bits = num_bits(EntropyCoder(model).encode(codes)) - 32
    assert ideal * 0.99 < bits < ideal * 1.01 + 32


@pytest.mark.slow
def test_a_memorised_sound_needs_few_bits():
    """A trained model shortens the codes of its training clip to less than a third, and those of others still work."""
    model, codes = entropy_model(dim=32), torch.randint(16, (20, 4))
    memorise(model, model.layout.pack({"codes": codes[None]}), steps=200)
    coder, repeated = EntropyCoder(model), codes.repeat(10, 1)
    assert num_bits(coder.encode(codes)) <= 0.3 * 4 * codes.numel()
    others = torch.randint(16, repeated.shape)
    assert torch.equal(coder.decode(coder.encode(others), *others.shape), others)


@pytest.mark.slow
def test_memory_is_that_of_one_window(monkeypatch):
    """Neither encoding nor decoding of a long sound runs the model on more rows than a window has."""
    coder, codes, rows = EntropyCoder(entropy_model()), torch.randint(16, (200, 4)), []
    embed = EntropyTransformer.embed
    monkeypatch.setattr(
        EntropyTransformer, "embed", lambda self, x, mask: (rows.append(x.shape[1]), embed(self, x, mask))[1]
    )
    assert torch.equal(coder.decode(coder.encode(codes), 200, 4), codes)
    assert len(rows) == 40 and max(rows) <= 20 + 3


@pytest.mark.slow
def test_damaged_codes_raise_one_line():
    """Flipped, missing, additional and foreign words and checksums, and numbers of frames that no file can have."""
    coder, codes = EntropyCoder(entropy_model(scale=6.0)), torch.randint(16, (45, 4))
    good = coder.encode(codes)
    words, checksums = good["entropy_words"], good["entropy_checksums"]
    flipped = [words.clone() for _ in range(len(words) - 1)]
    for place, part in enumerate(flipped):
        part[place] ^= 1 << (7 * place % 31)
    bad = [{**good, "entropy_words": part} for part in flipped]
    bad += [{**good, "entropy_words": part} for part in (words[:5], words[1:], words.float(), words[None], words[:0])]
    bad += [{**good, "entropy_checksums": part} for part in (checksums[:-1], checksums.flip(0), checksums.long())]
    bad += [{"entropy_words": words}, {"entropy_checksums": checksums}, {}]
    cases = [(tensors, 45, 4) for tensors in bad]
    cases += [(good, 44, 4), (good, 2**53, 4), (good, 45, 3), (good, 45, 5), (good, 45, 0)]
    for arguments in cases:
        with pytest.raises(ValueError, match="encode(d| )|another model|damaged") as caught:
            coder.decode(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="damaged, or this machine computes other probabilities"):
        EntropyCoder(entropy_model(scale=6.0, seed=1)).decode(good, 45, 4)


def test_weights_that_are_not_finite_raise():
    """They are refused before anything is written."""
    model = entropy_model()
    model.heads[0].weight.data[3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        EntropyCoder(model).encode(torch.zeros(3, 4, dtype=torch.long))


def test_files_of_compressed_codes(tmp_path, write_tone):
    """A file needs the model that wrote it, and a file without entropy coding is read without a model only."""
    coder, path = EntropyCoder(entropy_model()), tmp_path / "a.safetensors"
    stored = FileCodec(FakeCodec()).encode(write_tone("a.wav", 0.5, 8000))
    raw_bytes = write_codes(tmp_path / "raw.safetensors", stored)
    assert raw_bytes == 2 * stored.codes.numel() > write_codes(path, stored, coder)
    for name, compressor in (("raw.safetensors", None), ("a.safetensors", coder)):
        got = read_codes(tmp_path / name, compressor)
        assert torch.equal(got.codes, stored.codes) and got.info == stored.info
    for compressor in (None, EntropyCoder(entropy_model(seed=1))):
        with pytest.raises(ValueError, match="a.safetensors: the codes are compressed .*--entropy"):
            read_codes(path, compressor)
    with pytest.raises(ValueError, match="raw.safetensors: the codes are not compressed"):
        read_codes(tmp_path / "raw.safetensors", coder)


@pytest.mark.slow
def test_trainer_saves_a_model_of_the_codec(tmp_path, write_folder):
    """The trained model has the fingerprint of the codec and the length of its crops, and codes after loading."""
    codec = FakeCodec()
    model = EntropyTransformer(**SIZES, codebook_size=codec.codebook_size, num_quantizers=codec.num_quantizers)
    EntropyTransformerTrainer(
        transformer=model,
        codec=codec,
        folder=write_folder(num_files=4, sample_hz=codec.target_sample_hz),
        data_max_length_seconds=0.4,
        batch_size=2,
        num_train_steps=2,
        results_folder=tmp_path / "run",
    ).train()
    loaded = load_module(tmp_path / "run" / "entropy", expect=EntropyTransformer)
    assert loaded.token_fingerprints == {"acoustic": codec.fingerprint()} and loaded.max_seconds == 0.4
    codes = torch.randint(codec.codebook_size, (30, codec.num_quantizers))
    coded = EntropyCoder(model).encode(codes)
    assert EntropyCoder(loaded).fingerprint == model.fingerprint()
    assert torch.equal(EntropyCoder(loaded).decode(coded, *codes.shape), codes)
