import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from audiolm_pytorch import HubertWithKmeans, KMeansTokenizer, SemanticTransformer, open_encoder
from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import load_module, save_module
from audiolm_pytorch.semantic import BestRQEncoder, SemanticTokenizer, TransformersEncoder
from tests.helpers.fakes import SIZES
from tests.helpers.published_files import hubert_settings, tiny_hubert, write_hubert_checkpoint, write_kmeans

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[4]
RECORDINGS = ROOT.parent / "shared" / "data" / "recordings"
needs_recordings = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not part of the repository")
COMPRESSIONS = {"plain": 0, "zlib": ("zlib", 3), "gzip": ("gzip", 3), "bz2": ("bz2", 3), "xz": ("xz", 3)}


def sounds(num_items: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    """Waves `[b, n]` of gliding tones and noise, so that frames differ."""
    generator = torch.Generator().manual_seed(seed)
    steps = -(-num_samples // 1600)
    pitch, loudness = (
        torch.rand(num_items, steps, generator=generator).repeat_interleave(1600, dim=1)[:, :num_samples]
        for _ in range(2)
    )
    tones = (0.01 + 0.3 * pitch).cumsum(dim=1).sin()
    return 0.5 * loudness * tones + 0.02 * torch.randn(num_items, num_samples, generator=generator)


@torch.no_grad()
def hidden_states(model: torch.nn.Module, wave: torch.Tensor, layer: int) -> torch.Tensor:
    """Features `[t, d]` of transformers for a wave `[n]`, which is normalised for large models."""
    if model.config.feat_extract_norm == "layer":
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
        wave = torch.from_numpy(extractor(wave.numpy(), sampling_rate=16_000).input_values[0])
    return model(wave[None], output_hidden_states=True).hidden_states[layer][0]


def centroids_for(model: torch.nn.Module, layer: int, num_clusters: int = 50) -> np.ndarray:
    """Frames of some sounds as centroids, so that every cluster is near features."""
    frames = torch.cat([hidden_states(model, wave, layer) for wave in sounds(3, 24_000, seed=9)])
    chosen = torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))[:num_clusters]
    return np.ascontiguousarray(frames[chosen].numpy())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A base model, its checkpoint and the k-means of its ninth layer: model, estimator, both paths."""
    folder = tmp_path_factory.mktemp("published")
    model = tiny_hubert()
    checkpoint = write_hubert_checkpoint(folder / "hubert_base_ls960.pt", model)
    kmeans_path = folder / "hubert_base_ls960_L9_km500.bin"
    return model, write_kmeans(kmeans_path, centroids_for(model, 9)), checkpoint, kmeans_path


@pytest.fixture(scope="module")
def tokenizer(published) -> HubertWithKmeans:
    return HubertWithKmeans(published[2], published[3])


def check_equal(tokenizer, model, estimator, waves, layer):
    """Check features (to 1e-5) and ids (exactly) of a batch with loud padding."""
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.full((len(waves), int(lengths.max())), 0.9)
    for row, wave in enumerate(waves):
        batch[row, : len(wave)] = wave
    features, mask = tokenizer.encoder.features(batch, lengths, tokenizer.layer)
    ids = tokenizer(batch, lengths=lengths)
    for row, wave in enumerate(waves):
        expected = hidden_states(model, wave, layer)
        count = tokenizer.num_frames(len(wave))
        assert count == len(expected) and mask[row].sum() == count
        torch.testing.assert_close(features[row, :count], expected, rtol=1e-5, atol=1e-5)
        assert ids[row, :count].tolist() == estimator.predict(expected.numpy()).tolist()
        assert (ids[row, count:] == -1).all()
    return ids


def test_layout_of_the_tokens(tokenizer):
    """Guards the contract with the language models: rates, counts, types."""
    assert isinstance(tokenizer, SemanticTokenizer)
    facts = (tokenizer.target_sample_hz, tokenizer.downsample_factor, tokenizer.codebook_size, tokenizer.layer)
    assert facts == (16_000, 320, 50, 9) and tokenizer.encoder.depth == 9, "blocks behind the layer are dropped"
    ids = tokenizer(sounds(2, 16_000))
    assert ids.shape == (2, 49) and ids.dtype == torch.int64 and ids.unique().numel() > 10


@pytest.mark.slow
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(("layer", "large"), [(9, False), (1, False), (10, False), (5, True), (10, True)])
def test_ids_are_those_of_transformers_and_scikit_learn(tmp_path, compression, layer, large):
    """Files of the published layouts give the tokens of transformers and scikit-learn."""
    model = tiny_hubert(seed=layer, large=large)
    checkpoint = write_hubert_checkpoint(tmp_path / "hubert.pt", model, omegaconf=layer != 9, args=False)
    estimator = write_kmeans(tmp_path / "km.bin", centroids_for(model, layer), COMPRESSIONS[compression])
    tokenizer = HubertWithKmeans(checkpoint, tmp_path / "km.bin", output_layer=layer)
    waves = [wave[:length] for wave, length in zip(sounds(4, 12_000), (12_000, 400, 7_777, 11_999))]
    ids = check_equal(tokenizer, model, estimator, waves, layer)
    assert ids.unique().numel() > 10


@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize("large", [False, True])
def test_ids_are_equal_on_real_recordings(tmp_path, large):
    """The same on real sound, from stereo of 44.1 kHz that is mixed down and resampled, in one unequal batch."""
    from sklearn.cluster import MiniBatchKMeans

    model = tiny_hubert(large=large)
    checkpoint = write_hubert_checkpoint(tmp_path / "hubert.pt", model)
    paths = sorted(RECORDINGS.glob("*.ogg"))
    waves = [read_audio(path, start_seconds=1.0, duration_seconds=3 + row / 3) for row, path in enumerate(paths)]
    at_rate = [resample(wave[0], rate_hz, 16_000) for wave, rate_hz in waves]
    frames = torch.cat([hidden_states(model, wave, 9) for wave in at_rate])
    fitted = MiniBatchKMeans(n_clusters=100, random_state=0, n_init=1, max_iter=5).fit(frames.numpy())
    estimator = write_kmeans(tmp_path / "km.bin", fitted.cluster_centers_, ("zlib", 3))
    tokenizer = HubertWithKmeans(checkpoint, tmp_path / "km.bin")
    ids = check_equal(tokenizer, model, estimator, at_rate, 9)
    assert len(paths) >= 2 and ids.unique().numel() > 50
    for row, (wave, rate_hz) in enumerate(waves):
        count = tokenizer.num_frames(len(at_rate[row]))
        assert torch.equal(tokenizer(wave, input_sample_hz=rate_hz)[0], ids[row, :count])


@pytest.mark.slow
def test_every_source_of_one_model_gives_one_tokenizer(published, tokenizer, tmp_path):
    """Tokens computed before must stay valid when the same model comes from another kind of file."""
    model, _, checkpoint, kmeans_path = published
    model.save_pretrained(tmp_path / "folder")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "folder")
    save_file({"centroids": tokenizer.centroids}, tmp_path / "km.safetensors")
    save_module(tokenizer, tmp_path / "ours")
    others = [
        HubertWithKmeans(str(tmp_path / "folder"), kmeans_path),
        HubertWithKmeans(checkpoint, tmp_path / "km.safetensors"),
        load_module(tmp_path / "ours", HubertWithKmeans),
        KMeansTokenizer(
            encoder=TransformersEncoder(LoadedModel(model), layer_count=9), layer=9, centroids=tokenizer.centroids
        ),
    ]
    wave = sounds(1, 20_000)
    for other in others:
        assert torch.equal(other(wave), tokenizer(wave)) and other.fingerprint() == tokenizer.fingerprint()
    assert not any(path.suffix in (".pt", ".bin") for path in (tmp_path / "ours").iterdir())


def test_centroids_with_a_normalisation_use_it(published, tmp_path):
    """Centroids fitted to normalised features must not be compared with raw ones."""
    model, _, checkpoint, _ = published
    frames = hidden_states(model, sounds(1, 20_000)[0], 3)
    mean, std = frames.mean(dim=0), frames.std(dim=0) + 0.1
    centroids = (frames[::7] - mean) / std
    save_file({"centroids": centroids, "mean": mean, "std": std}, tmp_path / "km.safetensors")
    tokenizer = HubertWithKmeans(checkpoint, tmp_path / "km.safetensors", output_layer=3)
    expected = torch.cdist((frames - mean) / std, centroids).argmin(dim=-1)
    assert torch.equal(tokenizer(sounds(1, 20_000))[0], expected)


def test_a_checkpoint_says_whether_waves_are_normalised(tmp_path):
    """The argument decides on normalisation, else `task.normalize` of the file, not the kind of norm."""
    model = tiny_hubert(num_layers=2)
    write_kmeans(tmp_path / "km.bin", centroids_for(model, 2))
    settings = hubert_settings(model)
    for said in (False, True):
        settings["task"]["normalize"] = said
        checkpoint = write_hubert_checkpoint(tmp_path / f"{said}.pt", model, settings=settings)
        for asked in (None, False, True):
            found = HubertWithKmeans(checkpoint, tmp_path / "km.bin", output_layer=2, normalise_wave=asked)
            assert found.encoder.normalise_wave is (said if asked is None else asked)


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [None, 320, 1000])
def test_counts_are_exact_for_200_lengths(published, multiple):
    """The number of frames is (n - 400) // 320 + 1 after the cut, as in the model."""
    model, _, checkpoint, kmeans_path = published
    tokenizer = HubertWithKmeans(checkpoint, kmeans_path, output_layer=1, seq_len_multiple_of=multiple)
    for num_samples in torch.randint(1000, 9000, (200,), generator=torch.Generator().manual_seed(0)).tolist():
        left = num_samples // (multiple or 1) * (multiple or 1)
        counted = int(model._get_feat_extract_output_lengths(torch.tensor(left)))
        assert tokenizer.num_frames(num_samples) == counted == (left - 400) // 320 + 1
        assert tokenizer(torch.zeros(1, num_samples)).shape == (1, counted)
    seconds = [tokenizer.num_frames(16_000 * seconds) for seconds in (1, 10)]
    assert seconds == [49, 499] and (multiple != 320 or tokenizer.num_frames(320 * 32 + 319) == 31)


def test_lengths_are_cut_for_each_item_of_its_own(published):
    """`seq_len_multiple_of` cuts an item the same way alone and in a batch, before the model."""
    _, _, checkpoint, kmeans_path = published
    plain = HubertWithKmeans(checkpoint, kmeans_path)
    cutting = HubertWithKmeans(checkpoint, kmeans_path, seq_len_multiple_of=1000)
    wave, lengths = sounds(3, 9_500), torch.tensor([9_500, 4_999, 1_000])
    ids = cutting(wave, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        count = cutting.num_frames(length)
        expected = plain(wave[row : row + 1, : length // 1000 * 1000])[0]
        assert torch.equal(ids[row, :count], expected) and (ids[row, count:] == -1).all()
        assert torch.equal(cutting(wave[row : row + 1, :length])[0], expected)
    assert cutting.fingerprint() != plain.fingerprint()
    with pytest.raises(ValueError, match="too short"):
        cutting(wave, lengths=torch.tensor([9_500, 4_999, 999]))


def test_alone_equals_in_batch(tokenizer):
    """Ids of an item are equal alone and in a batch, for lengths from one frame to all."""
    lengths = torch.tensor([8_000, 400, 719, 720, 5_555, 8_000])
    wave = sounds(6, 8_000, seed=3)
    for row, length in enumerate(lengths.tolist()):
        wave[row, length:] = 5.0
    ids = tokenizer(wave, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        count = tokenizer.num_frames(length)
        assert torch.equal(ids[row, :count], tokenizer(wave[row : row + 1, :length])[0])
        assert (ids[row, count:] == -1).all()


def test_what_cannot_be_is_one_line_with_the_mend(published, tokenizer, tmp_path):
    """Common mistakes raise errors of one line with what to do."""
    model, _, checkpoint, kmeans_path = published
    write_kmeans(tmp_path / "wide.bin", np.zeros((5, 17), dtype=np.float32))
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:3000])
    (tmp_path / "cut.bin").write_bytes(kmeans_path.read_bytes()[:200])
    tiny_hubert(num_layers=2).save_pretrained(tmp_path / "short")

    def opening(*arguments, **keywords):
        return lambda: HubertWithKmeans(*arguments, **keywords)

    for attempt, message in [
        (opening(checkpoint, kmeans_path, target_sample_hz=24_000), "needs 16000 Hz.*input_sample_hz=24000"),
        (
            opening(checkpoint, kmeans_path, output_layer=11),
            r"output_layer .* in 0\.\.10, since .* has 10 layers, got 11",
        ),
        (opening(checkpoint, kmeans_path, output_layer=-1), r"0\.\.10, since .* got -1"),
        (opening(tmp_path / "short", kmeans_path), r"must be in 0\.\.2, since .* has 2 layers, got 9"),
        (opening(checkpoint, tmp_path / "wide.bin"), "width 17, .* width 16; .*fitted to this model"),
        (opening(checkpoint, kmeans_path, seq_len_multiple_of=0), "at least 1 sample"),
        (opening("./hubert/missing.pt", kmeans_path), "no file hubert/missing.pt"),
        (opening("hubert/missing.pt", kmeans_path), "no file hubert/missing.pt"),
        (opening(tmp_path / "missing", kmeans_path), "there is no folder"),
        (opening(checkpoint, tmp_path / "missing.bin"), "missing.bin cannot be read .*give a k-means as published"),
        (opening(tmp_path / "cut.pt", kmeans_path), "cut.pt .*damaged.*again"),
        (opening(checkpoint, tmp_path / "cut.bin"), "cut.bin .*damaged.*again"),
        (opening(checkpoint, checkpoint), "is a torch checkpoint, not a k-means; check the order of the two paths"),
        (opening(kmeans_path, checkpoint), "is a torch checkpoint, not a k-means; check the order of the two paths"),
        (lambda: tokenizer(torch.zeros(1, 399)), "399 samples is too short: a frame needs 400.*longer wave"),
        (lambda: tokenizer(torch.zeros(1, 1000), input_sample_hz=44_100), "363 samples is too short"),
        (lambda: tokenizer(torch.zeros(1, 2, 1000)), "mix the channels down"),
        (lambda: tokenizer(torch.full((1, 1000), torch.nan)), "NaN"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_encoders_open_from_everywhere(published, tokenizer, tmp_path):
    """`open_encoder` opens every kind of source, and raises an error where there is no encoder."""
    model, _, checkpoint, _ = published
    model.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    own = BestRQEncoder(dim=32, depth=1, heads=2, dim_head=16, sample_hz=4000, num_mels=20, n_fft=256, hop_length=40)
    save_module(own.eval(), tmp_path / "own")
    save_module(tokenizer, tmp_path / "tokenizer")
    save_module(tokenizer.encoder, tmp_path / "encoder")
    wave = sounds(1, 6000)
    expected = tokenizer.encoder.features(wave)[0]
    for source in (checkpoint, str(checkpoint), tmp_path / "theirs", tmp_path / "tokenizer", tmp_path / "encoder"):
        found = open_encoder(source, offline=True)
        assert isinstance(found, TransformersEncoder)
        assert torch.equal(found.features(wave, None, 9)[0], expected)
    assert isinstance(open_encoder(tmp_path / "own"), BestRQEncoder)
    save_module(SemanticTransformer(num_semantic_tokens=12, **SIZES), tmp_path / "other")
    for source, message in [
        (tmp_path / "other", "holds a SemanticTransformer, but a FrameEncoder is needed"),
        (tmp_path / "missing.pt", "there is no file"),
        (tmp_path / "missing", "there is no folder"),
        (tmp_path, "no config.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_encoder(source)


def test_files_of_this_machine_need_no_network(published, tmp_path, monkeypatch):
    """Fault 9: constructing and loading do not use the network; an id that is not cached is an error of one line."""
    _, _, checkpoint, kmeans_path = published

    def refuse(*arguments, **keywords):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    save_module(HubertWithKmeans(checkpoint, kmeans_path), tmp_path / "ours")
    load_module(tmp_path / "ours")
    with pytest.raises(ValueError, match="offline: nothing is downloaded") as caught:
        HubertWithKmeans("nobody/nothing", kmeans_path, offline=True, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_works_where_the_libraries_of_the_files_are_absent(published, tokenizer, tmp_path):
    """Fault 10: fairseq, omegaconf, torchaudio, joblib and scikit-learn are not needed, nor transformers to import."""
    _, _, checkpoint, kmeans_path = published
    wave = sounds(2, 8000)
    torch.save({"wave": wave}, tmp_path / "wave.pt")
    program = """
        import sys
        for name in ("fairseq", "omegaconf", "torchaudio", "joblib", "sklearn"):
            sys.modules[name] = None  # as if it were not installed
        import audiolm_pytorch
        heavy = {name.partition(".")[0] for name in sys.modules} & {"transformers", "huggingface_hub", "matplotlib"}
        if heavy:
            raise SystemExit(f"importing audiolm_pytorch imports {heavy}")
        import torch
        from audiolm_pytorch.saving.modules import load_module, save_module
        checkpoint, kmeans, wave, folder = sys.argv[1:]
        wave = torch.load(wave)["wave"]
        tokenizer = audiolm_pytorch.HubertWithKmeans(checkpoint, kmeans)
        save_module(tokenizer, folder)
        if not torch.equal(load_module(folder)(wave), tokenizer(wave)):
            raise SystemExit("the saved tokenizer gives other ids")
        print(*tokenizer(wave).flatten().tolist())
    """
    arguments = [checkpoint, kmeans_path, tmp_path / "wave.pt", tmp_path / "saved"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == tokenizer(wave).flatten().tolist()
