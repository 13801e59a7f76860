import copy
import json
import socket

import pytest
import torch

from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import FrameEncoder
from audiolm_pytorch.semantic.pretrained import filterbank
from audiolm_pytorch.semantic.pretrained.encoder import TransformersEncoder
from tests.helpers.quick import only_quick

transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
CONVOLUTIONS = dict(conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
LARGE = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
MODELS = {
    "hubert": ("HubertModel", CONVOLUTIONS),
    "hubert_large": ("HubertModel", CONVOLUTIONS | LARGE),
    "wavlm": ("WavLMModel", CONVOLUTIONS),
    "wavlm_large": ("WavLMModel", CONVOLUTIONS | LARGE),
    "wav2vec2": ("Wav2Vec2Model", CONVOLUTIONS | {"add_adapter": True}),
    "data2vec": ("Data2VecAudioModel", {"conv_dim": [8] * 7, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}),
    "unispeech_sat": ("UniSpeechSatModel", CONVOLUTIONS),
    "conformer": ("Wav2Vec2ConformerModel", CONVOLUTIONS | {"conv_depthwise_kernel_size": 5}),
    "w2v_bert": ("Wav2Vec2BertModel", {"conv_depthwise_kernel_size": 5, "left_max_position_embeddings": 6}),
}


def random_model(name, **changes):
    model_class, settings = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model_class)
    model = made(made.config_class(**SIZES, **settings, **changes))
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if "norm" in tensor_name or tensor_name.endswith("bias"):
                tensor.add_(0.2 * torch.randn(tensor.shape))
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return {name: random_model(name) for name in MODELS}


def noise(num_items, num_samples, seed=0):
    """Waves `[b, n]` of changing loudness and nonzero mean."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(num_items, num_samples // 800 + 1, generator=generator).repeat_interleave(800, dim=1)
    return 0.1 * loudness[:, :num_samples] * torch.randn(num_items, num_samples, generator=generator) + 0.02


def theirs(name, model, wave):
    """All hidden states that transformers computes from waves `[b, n]`."""
    with torch.no_grad():
        if name == "w2v_bert":
            extractor = transformers.SeamlessM4TFeatureExtractor()
            inputs = extractor(list(wave.numpy()), sampling_rate=16_000, return_tensors="pt")
            return model(**inputs, output_hidden_states=True).hidden_states
        return model(wave, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", only_quick(MODELS, ["hubert", "w2v_bert"]))
def test_hidden_states_are_those_of_transformers(models, name):
    """Features of every family equal those of transformers, so no layer, norm or adapter is wrong."""
    encoder = TransformersEncoder(LoadedModel(models[name]), normalise_wave=None if name == "w2v_bert" else False)
    assert isinstance(encoder, FrameEncoder)
    assert (encoder.sample_hz, encoder.downsample_factor, encoder.dim, encoder.depth) == (16_000, 320, 16, 3)
    wave = noise(2, 4003)
    expected = theirs(name, models[name], wave)
    for layer in range(4):
        features, mask = encoder.features(wave, None, layer)
        # their extractor pairs the last odd frame of w2v-BERT with zeros, and masks the pair
        assert mask.all() and features.shape == (2, encoder.num_frames(4003), 16)
        torch.testing.assert_close(features, expected[layer][:, : features.shape[1]], rtol=0, atol=2e-6)
    assert torch.equal(encoder.features(wave)[0], features), "no layer means the last one"


@pytest.mark.parametrize("name", only_quick(MODELS, ["hubert", "w2v_bert"]))
def test_truncated_is_shorter_and_the_same(models, name):
    """Any `layer_count` gives equal states: norms behind the last block and biases in the first are handled."""
    encoder = TransformersEncoder(LoadedModel(models[name]))
    wave = noise(1, 2000)
    for layer in range(4):
        short = encoder.truncated(layer)
        assert short.depth == layer and torch.equal(short.features(wave)[0], encoder.features(wave, None, layer)[0])
    with torch.no_grad():
        next(short.parameters()).add_(1.0)
    assert not torch.equal(next(short.parameters()), next(encoder.parameters())), "a copy must be independent"
    with pytest.raises(ValueError, match=r"0\.\.3"):
        encoder.truncated(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hubert", "w2v_bert"])
def test_frame_counts_are_exact(models, name):
    """The number of frames equals the model's for 200 random lengths; shorter waves raise an error."""
    model = models[name]
    encoder = TransformersEncoder(LoadedModel(model), layer_count=0)
    lengths = torch.randint(400, 9000, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    reach = {"hubert": 400, "w2v_bert": 560}[name]
    assert [encoder.num_frames(reach), encoder.num_frames(reach + 319), encoder.num_frames(reach + 320)] == [1, 1, 2]
    for num_samples in lengths if name == "hubert" else [length for length in lengths[:40] if length >= reach]:
        if name == "hubert":
            counted = int(model._get_feat_extract_output_lengths(torch.tensor(num_samples)))
        else:
            counted = (1 + (num_samples - 400) // 160) // 2
        assert encoder.num_frames(num_samples) == counted == encoder.features(noise(1, num_samples))[0].shape[1]
    with pytest.raises(
        ValueError, match=rf"{reach - 1} samples is too short: a frame needs {reach} samples at 16000 Hz"
    ):
        encoder.num_frames(reach - 1)


@pytest.mark.parametrize("name", ["hubert", "hubert_large", "wavlm", "w2v_bert"])
def test_alone_equals_in_batch(models, name):
    """Padding does not change features through group norm, convolutional positions or normalisation."""
    encoder = TransformersEncoder(LoadedModel(models[name]))
    wave, lengths = noise(5, 5000), torch.tensor([5000, 1700, 560, 3201, 1700])
    for row, length in enumerate(lengths.tolist()):
        wave[row, length:] = 7.0
    features, mask = encoder.features(wave, lengths, 2)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder.features(wave[row : row + 1, :length], None, 2)
        count = encoder.num_frames(length)
        assert mask[row].tolist() == [True] * count + [False] * (mask.shape[1] - count)
        torch.testing.assert_close(features[row, :count], alone[0], rtol=0, atol=1e-5)
        assert not features[row, count:].any()


@pytest.mark.slow
def test_waves_are_normalised_where_the_model_was_trained_so(models, tmp_path):
    """HuBERT base is not normalised by default, although the file in its folder has do_normalize."""
    wave = noise(1, 3000)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    normalised = torch.from_numpy(extractor(wave[0].numpy(), sampling_rate=16_000).input_values[0])[None]
    for name, wanted in (("hubert", False), ("wavlm", False), ("hubert_large", True), ("data2vec", True)):
        models[name].save_pretrained(tmp_path / name)
        extractor.save_pretrained(tmp_path / name)
        for choice in (None, True, False):
            encoder = TransformersEncoder(tmp_path / name, normalise_wave=choice)
            assert encoder.normalise_wave is (wanted if choice is None else choice)
            seen = normalised if encoder.normalise_wave else wave
            expected = theirs(name, models[name], seen)[3]
            torch.testing.assert_close(encoder.features(wave)[0], expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="filterbanks"):
        TransformersEncoder(LoadedModel(models["w2v_bert"]), normalise_wave=True)


@pytest.mark.parametrize("name", ["hubert", "hubert_large", "w2v_bert"])
def test_windows_change_nothing_below_attention(models, name):
    """Norms over time use the whole wave, so the input of the first block is equal with and without windows."""
    options = dict(window_seconds=0.4, context_seconds=0.2, layer_count=0)
    windowed = TransformersEncoder(LoadedModel(models[name]), **options)
    whole = TransformersEncoder(LoadedModel(models[name]), layer_count=0)
    for num_samples in (6_800, 6_719, 20_000, 20_400):
        wave = noise(2, num_samples)
        wave[:, 9_000:] *= 5
        torch.testing.assert_close(windowed.features(wave)[0], whole.features(wave)[0], rtol=0, atol=1e-5)


def test_windows_bound_what_attention_sees(models):
    """No block receives more frames than a window with its context."""
    encoder = TransformersEncoder(LoadedModel(models["hubert"]), window_seconds=0.4, context_seconds=0.2)
    seen = []
    encoder.model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    features, mask = encoder.features(noise(1, 40_000))
    assert max(seen) == 40 and len(seen) == -(-124 // 20) and features.shape[1] == mask.sum() == 124
    with pytest.raises(ValueError, match="window_seconds must be positive"):
        TransformersEncoder(LoadedModel(models["hubert"]), window_seconds=0.0)


def test_filterbanks_are_the_same_in_parts(monkeypatch):
    """Filterbanks of a long wave are computed in chunks and normalised over the whole wave."""
    wave = noise(2, 30_000)
    front = filterbank.Filterbank()
    whole = front(wave)
    monkeypatch.setattr(filterbank, "_FRAMES_PER_CHUNK", 7)
    torch.testing.assert_close(front(wave), whole, rtol=0, atol=1e-5)
    expected = transformers.SeamlessM4TFeatureExtractor()(list(wave.numpy()), sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(whole, expected["input_features"][:, : whole.shape[1]], rtol=0, atol=1e-5)
    assert torch.isfinite(front(torch.zeros(1, 2000))).all()


@pytest.mark.parametrize("name", only_quick(MODELS, ["hubert", "w2v_bert"]))
def test_save_and_load_give_equal_features(models, name, tmp_path):
    """Encoders of every family, also with dropped blocks, come back from a file with the same fingerprint."""
    encoder = TransformersEncoder(LoadedModel(models[name]), layer_count=2, window_seconds=0.1)
    save_module(encoder, tmp_path / "encoder")
    loaded = load_module(tmp_path / "encoder", TransformersEncoder)
    wave = noise(1, 4000)
    assert torch.equal(loaded.features(wave)[0], encoder.features(wave)[0])
    assert loaded.fingerprint() == encoder.fingerprint() and loaded.depth == 2
    unused = ("adapter", "intermediate_ffn", "masked_spec_embed", "encoder.layers.2.")
    assert not any(name in weight for weight in loaded.state_dict() for name in unused)
    assert json.dumps(loaded.config, sort_keys=True) == json.dumps(encoder.config, sort_keys=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_fingerprint_follows_what_makes_the_features(models, tmp_path):
    """The fingerprint depends on what makes the features, not on dropped blocks or names of weights."""
    model = models["hubert"]
    model.save_pretrained(tmp_path / "model")
    encoder = TransformersEncoder(tmp_path / "model", layer_count=2)
    same = [
        encoder.truncated(2),
        TransformersEncoder(LoadedModel(model)).truncated(2),
        TransformersEncoder(LoadedModel(model), layer_count=2),
    ]
    renamed = copy.deepcopy(model)
    stored = renamed.encoder.pos_conv_embed.conv.parametrizations.weight
    convolution = torch.nn.utils.weight_norm(torch.nn.Conv1d(16, 16, 16, padding=8, groups=2), dim=2)
    convolution.weight_g.data, convolution.weight_v.data = stored.original0.data, stored.original1.data
    convolution.bias = renamed.encoder.pos_conv_embed.conv.bias
    renamed.encoder.pos_conv_embed.conv = convolution
    same.append(TransformersEncoder(LoadedModel(renamed), layer_count=2))
    assert {other.fingerprint() for other in same} == {encoder.fingerprint()}
    other_blocks = copy.deepcopy(model)
    with torch.no_grad():
        other_blocks.encoder.layers[2].final_layer_norm.weight.add_(1.0)
        other_blocks.masked_spec_embed.add_(1.0)
    assert TransformersEncoder(LoadedModel(other_blocks), layer_count=2).fingerprint() == encoder.fingerprint()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.encoder.layers[1].final_layer_norm.weight.add_(1.0)
    other_activation = copy.deepcopy(model)
    other_activation.config.hidden_act = "relu"
    preprocessor = {"sampling_rate": 24_000}
    others = [
        TransformersEncoder(LoadedModel(changed), layer_count=2),
        TransformersEncoder(LoadedModel(other_activation), layer_count=2),
        TransformersEncoder(LoadedModel(model, preprocessor=preprocessor), layer_count=2),
        TransformersEncoder(LoadedModel(model), layer_count=1),
        TransformersEncoder(LoadedModel(model), layer_count=2, normalise_wave=True),
        TransformersEncoder(LoadedModel(model), layer_count=2, window_seconds=20),
        TransformersEncoder(LoadedModel(model), layer_count=2, context_seconds=1),
    ]
    assert len({encoder.fingerprint(), *(other.fingerprint() for other in others)}) == 8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hubert", "w2v_bert"])
def test_features_on_a_gpu_are_those_of_the_cpu(models, name):
    """Windows, statistics and filterbanks work on the device of the wave, with lengths on the CPU."""
    encoder = TransformersEncoder(LoadedModel(models[name]), window_seconds=0.4, context_seconds=0.2).truncated(3)
    wave, lengths = noise(2, 20_000), torch.tensor([20_000, 9_000])
    expected, mask = encoder.features(wave, lengths)
    features, on_gpu = encoder.cuda().features(wave.cuda(), lengths)
    assert torch.equal(on_gpu.cpu(), mask)
    torch.testing.assert_close(features.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_stays_frozen_and_in_eval_mode(models):
    """Features do not change in training mode or under autocast."""
    model = random_model("hubert", apply_spec_augment=True, mask_time_prob=0.9)
    encoder = TransformersEncoder(LoadedModel(model))
    container = torch.nn.ModuleList([encoder]).train()
    assert container.training and not any(module.training for module in encoder.modules())
    wave = noise(1, 4000)
    features, _ = encoder.features(wave)
    assert not features.requires_grad and not any(weight.requires_grad for weight in encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.features(wave)[0], features)
    assert torch.equal(encoder.features(wave.double())[0], features)


def test_the_rate_is_that_of_the_preprocessor(models, tmp_path):
    """The sample rate is that of the preprocessor file; music models have 24 kHz."""
    models["hubert"].save_pretrained(tmp_path)
    assert TransformersEncoder(tmp_path).sample_hz == 16_000
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=24_000).save_pretrained(tmp_path)
    assert TransformersEncoder(tmp_path).sample_hz == 24_000


def test_local_files_need_no_network(models, tmp_path, monkeypatch):
    """Fault 9: constructing does not use the network; an id that is not cached is an error of one line."""
    models["hubert"].save_pretrained(tmp_path / "owner" / "model")

    def refuse(*arguments, **keywords):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "owner" / "model", "owner/model"):
        assert TransformersEncoder(source).depth == 3
    save_module(TransformersEncoder("owner/model"), tmp_path / "ours")
    load_module(tmp_path / "ours")
    with pytest.raises(ValueError, match="offline: nothing is downloaded.*nobody/nothing") as caught:
        TransformersEncoder("nobody/nothing", offline=True, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_bad_sources_are_refused(models, tmp_path):
    """Sources that are no encoder raise an error of one line with what is needed."""
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    models["hubert"].save_pretrained(tmp_path / "hubert")
    models["w2v_bert"].save_pretrained(tmp_path / "w2v_bert")
    transformers.SeamlessM4TFeatureExtractor(num_mel_bins=40).save_pretrained(tmp_path / "w2v_bert")
    for source, options, message in [
        (tmp_path / "missing", {}, "there is no folder"),
        (tmp_path, {}, "no config.json"),
        (tmp_path / "bert", {}, "'bert'; pass a model of type 'data2vec-audio' or "),
        (tmp_path / "hubert", {"layer_count": 4}, r"layer_count .* must be in 0\.\.3, since .* has 3 layers, got 4"),
        (tmp_path / "w2v_bert", {}, "use files of the same model"),
        (LoadedModel(transformers.BertModel(transformers.BertConfig(**SIZES))), {}, "'bert' are not supported"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            TransformersEncoder(source, **options)
        assert "\n" not in str(caught.value)


def test_bad_waves_are_refused(models):
    """Wrong inputs raise an error instead of giving plausible features."""
    encoder = TransformersEncoder(LoadedModel(models["hubert"]))
    for wave, lengths, layer, message in [
        (torch.zeros(1, 2, 800), None, None, r"\[b, n\]"),
        (torch.zeros(1, 800, dtype=torch.int64), None, None, "float"),
        (torch.zeros(0, 800), None, None, "not empty"),
        (torch.full((1, 800), torch.nan), None, None, "NaN"),
        (torch.full((1, 800), torch.inf), None, None, "infinite"),
        (torch.zeros(1, 399), None, None, "399 samples is too short: a frame needs 400 samples"),
        (torch.zeros(2, 800), torch.tensor([800, 399]), None, "399 samples is too short"),
        (torch.zeros(2, 800), torch.tensor([800, 801]), None, r"1\.\.800"),
        (torch.zeros(1, 800), None, 4, r"0\.\.3"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            encoder.features(wave, lengths, layer)
        assert "\n" not in str(caught.value)
