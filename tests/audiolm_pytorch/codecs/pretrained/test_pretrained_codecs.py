import copy
import json
import logging
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from audiolm_pytorch import AudioLM, CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.codecs import Codec, DacWrapper, EncodecWrapper, MimiWrapper, SoundStream
from audiolm_pytorch.codecs.pretrained import chunked
from audiolm_pytorch.codecs.pretrained.chunked import Span, apply_chunked, span_of
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import save_module
from tests.helpers.fakes import SIZES, FakeSemanticTokenizer
from tests.helpers.quick import only_quick
from tests.helpers.toy_audiolm import wrapped_stages

transformers = pytest.importorskip("transformers")

ENCODEC = {"sampling_rate": 800, "num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2]}
ENCODEC |= {"num_lstm_layers": 1, "codebook_size": 1024, "target_bandwidths": [2.0, 4.0]}
STEREO = {"audio_channels": 2, "normalize": True, "chunk_length_s": 0.5, "overlap": 0.01}
STEREO |= {"use_causal_conv": False, "norm_type": "time_group_norm"}
DAC = {"sampling_rate": 800, "encoder_hidden_size": 4, "downsampling_ratios": [2, 5], "decoder_hidden_size": 16}
DAC |= {"n_codebooks": 4, "codebook_size": 16, "codebook_dim": 4}
MIMI = {"sampling_rate": 800, "num_filters": 2, "hidden_size": 16, "upsampling_ratios": [4, 2]}
MIMI |= {"codebook_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4}
MIMI |= {"upsample_groups": 16, "num_hidden_layers": 2, "intermediate_size": 16, "sliding_window": 5}
MIMI |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CONFIGS = {
    "encodec_mono": lambda: transformers.EncodecConfig(**ENCODEC),
    "encodec_stereo": lambda: transformers.EncodecConfig(**ENCODEC, **STEREO),
    "dac": lambda: transformers.DacConfig(**DAC),
    "mimi": lambda: transformers.MimiConfig(**MIMI),
}
MODELS = {"encodec": "EncodecModel", "dac": "DacModel", "mimi": "MimiModel"}
every_codec = pytest.mark.parametrize("name", only_quick(CONFIGS, ["mimi"]))


def random_model(config):
    """A model whose every weight matters: transformers starts codebooks at zero and DAC almost silent."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[config.model_type])(config)
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name.endswith((".embed", ".embed_sum", ".codebook.weight")):
            tensor.normal_()
    if config.model_type == "dac":
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
                torch.nn.init.xavier_normal_(module.weight)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every model, and the folder it was saved to in the published format."""
    found = {}
    for name, config in CONFIGS.items():
        model, folder = random_model(config()), tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        found[name] = (model, folder)
    return found


@pytest.fixture
def folder(models, tmp_path):
    """A copy of the mono EnCodec's folder, to be spoiled."""
    return shutil.copytree(models["encodec_mono"][1], tmp_path / "model")


def theirs(name, model, wave):
    """Codes `[b, f, q]` and waves `[b, c, n]` of transformers' own encode and decode."""
    if name == "dac":
        codes = model.encode(F.pad(wave, (0, -wave.shape[-1] % 10))).audio_codes
        return codes.transpose(1, 2), model.decode(audio_codes=codes).audio_values[:, None]
    if name == "mimi":
        codes = model.encode(wave).audio_codes
        return codes.transpose(1, 2), model.decode(codes).audio_values
    found = model.encode(wave, bandwidth=4.0)
    padding = found.last_frame_pad_length or 0
    codes = torch.cat(list(found.audio_codes), dim=-1)
    codes = codes[..., : codes.shape[-1] - padding]
    decoded = model.decode(found.audio_codes, found.audio_scales, last_frame_pad_length=padding)
    return codes.transpose(1, 2), decoded.audio_values


def ours(codec, wave):
    """The same of an adapter, with the scales where there are any."""
    if isinstance(codec, EncodecWrapper):
        found = codec.encode(wave)
        return found.codes, codec.decode(*found)
    codes = codec.tokenize(wave)
    return codes, codec.decode_from_codebook_indices(codes)


@pytest.mark.slow
@every_codec
@pytest.mark.parametrize("num_samples", [1, 5, 800, 1203])
def test_codes_and_waves_are_those_of_transformers(models, name, num_samples):
    """Other padding, scaling or order would produce codes that are incompatible with published models."""
    model, folder = models[name]
    codec = Codec.from_pretrained(folder)
    wave = torch.randn(2, codec.channels, num_samples) * 0.3
    expected_codes, expected_wave = theirs(name, model, wave)
    codes, decoded = ours(codec, wave)
    assert expected_codes.unique().numel() > 2 or num_samples < 10
    assert torch.equal(codes, expected_codes)
    assert torch.equal(codes, codec.tokenize(wave))
    common = expected_wave.shape[-1]
    torch.testing.assert_close(decoded[..., :common], expected_wave, rtol=0, atol=1e-5)
    assert not decoded[..., common:].any() and decoded.shape[-1] - common <= 2
    assert name == "dac" or common == decoded.shape[-1]


@every_codec
def test_adapter_meets_the_contract(models, name):
    """The stages use only these attributes and shapes."""
    codec = Codec.from_pretrained(models[name][1])
    assert isinstance(codec, Codec)
    assert (codec.target_sample_hz, codec.downsample_factor) == (800, {"dac": 10, "mimi": 16}.get(name, 8))
    assert codec.channels == (2 if name == "encodec_stereo" else 1)
    wave = torch.randn(3, codec.channels, 1000)
    codes = codec.tokenize(wave)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, codec.num_frames(1000), codec.num_quantizers)
    assert 0 <= codes.min() and codes.max() < codec.codebook_size
    if codec.channels == 1:
        assert torch.equal(codes, codec.tokenize(wave[:, 0]))
    assert codec.decode_from_codebook_indices(codes[:, :0]).shape == (3, codec.channels, 0)


@pytest.mark.slow
@every_codec
def test_any_number_of_samples_is_restored(models, name):
    """Lengths that are no multiple of a stride, shorter than a kernel, and around the ends of segments."""
    codec = Codec.from_pretrained(models[name][1])
    for num_samples in [*range(1, 42), 395, 396, 397, 398, 399, 400, 401, 404, 405, 792, 793, 797, 1193, 1197, 1601]:
        wave = torch.randn(1, codec.channels, num_samples)
        codes = codec.tokenize(wave)
        assert codes.shape[1] == codec.num_frames(num_samples)
        decoded = codec.decode_from_codebook_indices(codes, num_samples=num_samples)
        assert decoded.shape == wave.shape and torch.isfinite(decoded).all()
    with pytest.raises(ValueError, match="frames of codes cover"):
        codec.decode_from_codebook_indices(codes, num_samples=2000)


@every_codec
def test_an_item_alone_equals_itself_in_a_padded_batch(models, name):
    """Padding does not change codes through reflections, look-ahead, loudness or norms over time."""
    codec = Codec.from_pretrained(models[name][1])
    wave = torch.randn(4, codec.channels, 1203)
    lengths = torch.tensor([1203, 801, 3, 801])
    codes = codec.tokenize(wave, lengths)
    assert codes.shape[1] == codec.num_frames(1203)
    for row, length in enumerate(lengths.tolist()):
        num_frames = codec.num_frames(length)
        assert torch.equal(codes[row, :num_frames], codec.tokenize(wave[row : row + 1, :, :length])[0])
        assert (codes[row, num_frames:] == -1).all()
    assert codec.tokenize(wave[1:], lengths[1:]).shape[1] == codec.num_frames(1203)


@every_codec
def test_any_number_of_levels_decodes(models, name):
    """A prefix of the levels is a coarser version of the same sound."""
    codec = Codec.from_pretrained(models[name][1])
    codes = codec.tokenize(torch.randn(1, codec.channels, 400))
    waves = [codec.decode_from_codebook_indices(codes[..., :levels]) for levels in range(1, codec.num_quantizers + 1)]
    assert len(waves) >= 2 and not torch.equal(waves[0], waves[1])
    assert {wave.shape for wave in waves} == {waves[0].shape}


@every_codec
def test_long_audio_in_chunks_has_the_same_result(models, name, monkeypatch):
    """Convolutions receive at most a chunk with its context."""
    codec = Codec.from_pretrained(models[name][1])
    wave = torch.randn(1, codec.channels, 4003)
    codes, decoded = ours(codec, wave)
    monkeypatch.setattr(chunked, "CHUNK_SAMPLES", 300)
    longest = []
    for module in codec.model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_pre_hook(lambda _, args: longest.append(args[0].shape[-1]))
    codes_of_pieces, decoded_of_pieces = ours(codec, wave)
    assert max(longest) < 2000
    assert torch.equal(codes_of_pieces, codes)
    torch.testing.assert_close(decoded_of_pieces, decoded, rtol=0, atol=1e-5)


def test_reach_is_an_upper_bound():
    """In float64, chunks equal the whole; with an eighth of the reach they do not."""
    model = random_model(CONFIGS["dac"]()).double()
    wave = torch.randn(1, 1, 3000, dtype=torch.float64)
    whole, span = model.encoder(wave), span_of([model.encoder])
    assert span.scale == 10 and span_of([model.decoder]).scale == pytest.approx(0.1)
    torch.testing.assert_close(apply_chunked(model.encoder, wave, span, 200), whole, rtol=0, atol=1e-12)
    short = Span(span.reach / 8, span.scale)
    assert (apply_chunked(model.encoder, wave, short, 200) - whole).abs().max() > 1e-6


@pytest.mark.slow
def test_stereo_segments_have_scales(models):
    """Scales restore the loudness of segments; without them all segments are equally loud."""
    codec = Codec.from_pretrained(models["encodec_stereo"][1])
    loud = torch.randn(1, 2, 396)
    wave = torch.cat([loud, loud * 0.01, torch.zeros(1, 2, 396)], dim=-1)
    codes, scales = codec.encode(wave)
    assert scales.shape == (1, 3) and scales[0, 2] == 0 + 1e-8
    decoded = codec.decode(codes, scales, num_samples=1188)
    assert decoded[..., 800:].abs().max() < 1e-5
    plain = codec.decode_from_codebook_indices(codes, num_samples=1188)
    torch.testing.assert_close(plain, codec.decode(codes, torch.full((1, 3), 0.1), num_samples=1188))
    quieter = EncodecWrapper(models["encodec_stereo"][1], codes_only_rms=0.01)
    torch.testing.assert_close(quieter.decode(codes, num_samples=1188), plain / 10)
    padded = codec.encode(torch.cat([wave, wave]), torch.tensor([1188, 5]))
    torch.testing.assert_close(padded.scales[:1], scales)
    assert padded.scales[1, 0] > 0 and not padded.scales[1, 1:].any()
    with pytest.raises(ValueError, match="one per segment"):
        codec.decode(codes, scales[:, :2])
    with pytest.raises(ValueError, match="does not normalise"):
        mono = Codec.from_pretrained(models["encodec_mono"][1])
        mono.decode(mono.tokenize(torch.randn(1, 80)), torch.ones(1, 1))
    assert Codec.from_pretrained(models["encodec_mono"][1]).encode(torch.randn(1, 80)).scales is None


def test_frames_of_segments_follow_from_the_number_of_frames(models):
    """Also if the last segment but one is shorter, which transformers cannot encode."""
    config = CONFIGS["encodec_stereo"]()
    config.overlap = 0.1
    codec = EncodecWrapper(LoadedModel(random_model(config)))
    assert (codec.segment_samples, codec.segment_stride_samples) == (400, 360)
    wave = torch.randn(1, 2, 720 + 3)
    with pytest.raises(RuntimeError):
        codec.model.encode(wave, bandwidth=4.0)
    assert codec._frames_of_segments(codec.num_frames(723)) == [50, 46, 1]
    codes, scales = codec.encode(wave)
    last = codec.encode(wave[..., 720:])
    assert torch.equal(codes[:, -1:], last.codes) and codec.decode(codes, scales, 723).shape == wave.shape
    whole = EncodecWrapper(LoadedModel(random_model(CONFIGS["encodec_stereo"]())))
    assert all(sum(whole._frames_of_segments(num)) == num for num in range(300))
    with pytest.raises(ValueError, match="this codec encodes no wave as 48 frames"):
        codec.decode_from_codebook_indices(codes[:, :48])


def test_published_segments_have_150_frames():
    """48 kHz: 1 s with 1% overlap."""
    config = transformers.EncodecConfig(**{**ENCODEC, **STEREO, "chunk_length_s": 1.0, "sampling_rate": 48000})
    config.upsampling_ratios = [40, 8]
    codec = EncodecWrapper(LoadedModel(transformers.EncodecModel(config)), bandwidth_kbps=2.0)
    assert codec.num_frames(47520) == 149 and codec.num_frames(48000) == 152 and codec.num_frames(480000) == 1515
    assert codec.num_frames(47520 * 9 + 1) == 150 * 8 + 149 + 1


@pytest.mark.slow
def test_a_local_folder_needs_no_network_and_a_hub_id_raises_offline(models, tmp_path, monkeypatch):
    """Without a network, local folders open and missing ones are named; no connection is tried."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert Codec.from_pretrained(str(models["mimi"][1]), offline=True).num_quantizers == 4
    for opener in (Codec.from_pretrained, EncodecWrapper, DacWrapper, MimiWrapper):
        with pytest.raises(ValueError, match="offline.*local folder"):
            opener("facebook/encodec_24khz", offline=True, cache_dir=tmp_path)
    for missing in ("./no/such", tmp_path / "owner" / "name", "model"):
        with pytest.raises(ValueError, match="there is no folder"):
            Codec.from_pretrained(missing)


def test_a_hub_id_is_downloaded_once_with_its_revision_and_licence(models, tmp_path, monkeypatch, caplog):
    """Source, commit and licence are logged once and kept."""
    snapshot = shutil.copytree(models["mimi"][1], tmp_path / "snapshots" / "0abc")
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(snapshot)
    )
    with caplog.at_level(logging.INFO, "audiolm_pytorch"):
        codec = MimiWrapper(revision="main", num_quantizers=3)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "kyutai/mimi: licence of the weights CC-BY 4.0 (kyutai-labs/moshi)"
    assert (codec.origin["source"], codec.origin["revision"]) == ("kyutai/mimi", "0abc")
    assert codec.origin["licence"].startswith("CC-BY 4.0") and codec.bitrate_kbps() == pytest.approx(0.6)
    ((name, options),) = asked
    assert name == "kyutai/mimi" and options["revision"] == "main" and not options["local_files_only"]
    assert "*.bin" not in options["allow_patterns"]
    (snapshot / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nlicense: other\n")
    assert MimiWrapper().origin["licence"] == "mit (model card)"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models["mimi"][1], tmp_path / "kyutai" / "mimi")
    assert MimiWrapper().origin["revision"] is None, "a local folder always wins"


def test_without_transformers_the_extra_is_named(models, monkeypatch):
    """The message holds the pip command."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    for opener, source in ((Codec.from_pretrained, models["dac"][1]), (EncodecWrapper, "facebook/encodec_24khz")):
        with pytest.raises(ImportError, match=r'pip install "musiclm\[pretrained\]"'):
            opener(source)


def test_unreadable_models_raise(models, folder, tmp_path):
    """Missing weights and pickles never load."""
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="'encodec'; pass a model of type 'dac'"):
        DacWrapper(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'.*dac, encodec, mimi"):
        Codec.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"sampling_rate": 1}))
    with pytest.raises(ValueError, match="format_version None"):
        Codec.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "lstm" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="missing or of another shape.*lstm"):
        Codec.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(ValueError, match="cannot be loaded as EncodecModel"):
        Codec.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pytorch_model.bin.*save_pretrained"):
        Codec.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no complete Codec .config.json is missing"):
        Codec.from_pretrained(folder)


@pytest.mark.parametrize(("name", "size"), [("hidden_size", 40_000_000), ("num_lstm_layers", 20_000)])
def test_sizes_of_a_config_are_compared_with_the_file_before_memory_is_allocated(folder, name, size):
    """The weights would have 18 GB or more."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: size}))
    with pytest.raises(ValueError, match="far more values or layers than the file"):
        Codec.from_pretrained(folder)


@pytest.mark.slow
def test_weights_of_older_releases_and_of_half_precision_load(models, folder):
    """The published EnCodec files have the names of the old weight norm; half precision is loaded as float32."""
    new = load_file(folder / "model.safetensors")
    renames = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = {}
    for name, tensor in new.items():
        for after, before in renames.items():
            name = name.replace(after, before)
        old[name] = tensor
    assert set(old) != set(new)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    wave = torch.randn(1, 400)
    expected = Codec.from_pretrained(models["encodec_mono"][1])
    assert torch.equal(Codec.from_pretrained(folder).tokenize(wave), expected.tokenize(wave))
    assert Codec.from_pretrained(folder).fingerprint() == expected.fingerprint()
    expected.model.half().save_pretrained(folder)
    assert next(Codec.from_pretrained(folder).parameters()).dtype == torch.float32


@pytest.mark.slow
def test_fingerprint_depends_on_the_codec_only(models, folder):
    """Codecs with other codes have other fingerprints; the same codec in another folder has an equal one."""
    codec = EncodecWrapper(folder)
    moved = shutil.copytree(folder, folder.with_name("moved"))
    assert codec.fingerprint() == Codec.from_pretrained(moved).fingerprint() == copy.deepcopy(codec).fingerprint()
    codec.decode_from_codebook_indices(codec.tokenize(torch.randn(1, 100)))
    seen = {
        codec.fingerprint(),
        EncodecWrapper(folder, bandwidth_kbps=2).fingerprint(),
        copy.deepcopy(codec).half().fingerprint(),
    }
    codec.model.quantizer.layers[0].codebook.embed[0, 0] += 1e-3
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "pad_mode": "constant"}))
    seen |= {codec.fingerprint(), Codec.from_pretrained(moved).fingerprint()}
    assert len(seen) == 5
    assert len({Codec.from_pretrained(models[name][1]).fingerprint() for name in CONFIGS}) == 4


@pytest.mark.slow
@every_codec
def test_codec_is_frozen_and_stays_in_eval_mode(models, name):
    """train() of a parent module neither enables level dropout nor gradients."""
    codec = Codec.from_pretrained(models[name][1])
    wave = torch.randn(1, codec.channels, 200)
    codes = codec.tokenize(wave)
    parent = torch.nn.ModuleList([codec]).train()
    assert not any(module.training for module in parent[0].modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.tokenize(wave), codes)
    assert not codec.decode_from_codebook_indices(codes).requires_grad


@every_codec
def test_codec_is_copied_moved_and_saved_as_a_module(models, name, tmp_path):
    """Cached values that derive from weights follow copies, moves and loading."""
    codec = Codec.from_pretrained(models[name][1])
    wave = torch.randn(1, codec.channels, 200)
    codes = codec.tokenize(wave)
    twin = copy.deepcopy(codec)
    for parameter in codec.parameters():
        parameter.zero_()
    assert torch.equal(twin.tokenize(wave), codes)
    assert torch.equal(twin.double().tokenize(wave), codes)
    assert twin.decode_from_codebook_indices(codes).dtype == torch.float64
    save_module(twin.float(), tmp_path / "own")
    back = Codec.from_pretrained(tmp_path / "own")
    assert torch.equal(back.tokenize(wave), codes)
    assert (back.fingerprint(), fingerprint_of(back)) == (twin.fingerprint(), fingerprint_of(twin))
    assert back.origin["source"] == name and not any(parameter.requires_grad for parameter in back.parameters())


@pytest.mark.parametrize("name", ["encodec_mono", "dac", "mimi"])
def test_bad_audio_raises(models, name):
    """Wrong rank, channels, empty, integer, NaN and infinite audio."""
    codec = Codec.from_pretrained(models[name][1])
    for wave, message in (
        (torch.zeros(1, 2, 100), r"got shape \[1, 2, 100\]"),
        (torch.zeros(1, 0), "not empty"),
        (torch.zeros(1, 100, dtype=torch.int16), "divide integers"),
        (torch.full((1, 100), torch.nan), "NaN"),
        (torch.full((1, 100), torch.inf), "infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.tokenize(wave)


@pytest.mark.slow
def test_bad_requests_raise(models):
    """Wrong channels, lengths, codes and bitrates; the message states valid values."""
    codec = Codec.from_pretrained(models["encodec_stereo"][1])
    with pytest.raises(ValueError, match=r"must be \[b, 2, n\]"):
        codec.tokenize(torch.zeros(1, 100))
    for lengths in (torch.tensor([0, 1]), torch.tensor([1, 101]), torch.tensor([1]), torch.tensor([1.0, 2.0])):
        with pytest.raises(ValueError, match="lengths must"):
            codec.tokenize(torch.zeros(2, 2, 100), lengths)
    codes = codec.tokenize(torch.randn(1, 2, 100))
    for bad in (codes - 2000, codes + 2000, codes[0], codes.float(), torch.cat([codes] * 9, dim=-1)):
        with pytest.raises(ValueError, match="codes must"):
            codec.decode_from_codebook_indices(bad)
    with pytest.raises(ValueError, match=r"one of \[2.0, 4.0\]"):
        EncodecWrapper(models["encodec_mono"][1], bandwidth_kbps=6)
    for wrapper, name in ((DacWrapper, "dac"), (MimiWrapper, "mimi")):
        with pytest.raises(ValueError, match="1..4"):
            wrapper(models[name][1], num_quantizers=5)
        assert wrapper(models[name][1], num_quantizers=2).tokenize(torch.randn(1, 100)).shape[-1] == 2
    with pytest.raises(ValueError, match="codes_only_rms"):
        EncodecWrapper(models["encodec_stereo"][1], codes_only_rms=0.0)


@pytest.mark.slow
def test_silence_and_extremes_stay_finite(models):
    """The 48 kHz model divides by the loudness of a segment, which is zero for silence."""
    for name in CONFIGS:
        codec = Codec.from_pretrained(models[name][1])
        for level in (0.0, 1.0, -1.0, 1e-30):
            wave = torch.full((1, codec.channels, 300), level)
            assert torch.isfinite(codec.decode_from_codebook_indices(codec.tokenize(wave))).all()


def test_a_saved_soundstream_opens(tmp_path):
    """`Codec.from_pretrained` also opens our codecs; another module raises."""
    torch.manual_seed(0)
    codec = SoundStream(codebook_size=16, rq_num_quantizers=2, codebook_dim=8, channels=4, strides=(2, 4)).eval()
    save_module(codec, tmp_path / "codec")
    opened = Codec.from_pretrained(tmp_path / "codec", offline=True)
    assert isinstance(opened, SoundStream) and opened.fingerprint() == codec.fingerprint()
    save_module(codec.quantizer, tmp_path / "quantizer")
    with pytest.raises(ValueError, match="a Codec is needed"):
        Codec.from_pretrained(tmp_path / "quantizer")


def test_audiolm_generates_with_encodec(models):
    """The stages need only the contract of codecs."""
    codec = Codec.from_pretrained(models["encodec_mono"][1])
    assert codec.num_quantizers == 4
    audio_lm = AudioLM(
        wav2vec=FakeSemanticTokenizer(),
        codec=codec,
        semantic_transformer=SemanticTransformer(num_semantic_tokens=12, **SIZES),
        coarse_transformer=CoarseTransformer(
            num_semantic_tokens=12, codebook_size=1024, num_coarse_quantizers=2, rate_hz=100, **SIZES
        ),
        fine_transformer=FineTransformer(
            num_coarse_quantizers=2, num_fine_quantizers=2, codebook_size=1024, rate_hz=100, **SIZES
        ),
    )
    made = audio_lm.generate(GenerationRequest(seconds=0.2, prime_wave=torch.randn(1, 80) * 0.1, seeds=1))
    assert made.sample_hz == 800 and made.acoustic.shape[2] == 4
    assert made.wave.shape[-1] >= 160 and torch.isfinite(made.wave).all()
    wave = torch.rand(2, 320)
    loss = wrapped_stages(audio_lm)["coarse"](wave, input_sample_hz=800).loss
    assert torch.isfinite(loss)


@pytest.mark.slow
def test_published_sizes_have_the_published_rates():
    """Full-size models with random weights: frame rates, levels and bitrates of the papers."""
    stereo = {**STEREO, "chunk_length_s": 1.0, "sampling_rate": 48000, "target_bandwidths": [3.0, 6.0, 12.0, 24.0]}
    music = dict(sampling_rate=32000, upsampling_ratios=[8, 5, 4, 4], codebook_size=2048, target_bandwidths=[2.2])
    published = [
        (EncodecWrapper, transformers.EncodecConfig(), (24000, 1, 320, 75, 8, 1024, 6.0)),
        (EncodecWrapper, transformers.EncodecConfig(**stereo), (48000, 2, 320, 150, 4, 1024, 6.0)),
        (EncodecWrapper, transformers.EncodecConfig(**music), (32000, 1, 640, 50, 4, 2048, 2.2)),
        (DacWrapper, transformers.DacConfig(sampling_rate=44100), (44100, 1, 512, 86.1328125, 9, 1024, 7.751953125)),
        (MimiWrapper, transformers.MimiConfig(), (24000, 1, 1920, 12.5, 8, 2048, 1.1)),
    ]
    for wrapper, config, expected in published:
        model = getattr(transformers, wrapper.model_class)(config)
        codec = wrapper(LoadedModel(model))
        sample_hz, factor = codec.target_sample_hz, codec.downsample_factor
        rates = (sample_hz, codec.channels, factor, sample_hz / factor, codec.num_quantizers)
        assert (*rates, codec.codebook_size, codec.bitrate_kbps()) == pytest.approx(expected)
        num_samples = sample_hz // 10
        wave = torch.randn(1, codec.channels, num_samples) * 0.1
        codes = codec.tokenize(wave)
        assert codes.shape == (1, codec.num_frames(num_samples), codec.num_quantizers)
        assert codec.decode_from_codebook_indices(codes, num_samples).shape == wave.shape
