"""musicnn agrees with a network in numpy, and with the published reference where the data folder has it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from musiclm_pytorch.evaluation.musicnn import MusicNN, MusicNNExtractor, bundled_musicnn
from tests.helpers.published_musicnn import converted_musicnn

PUBLISHED = Path("/work/shared/data/musicnn")


def random_arrays(seed: int = 0) -> dict[str, torch.Tensor]:
    """Arrays with the names and layouts of the published checkpoint."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    arrays = {}
    kernels = [(7, 38, 1, 204), (7, 67, 1, 204), (128, 1, 1, 51), (64, 1, 1, 51), (32, 1, 1, 51)]
    kernels += [(7, 561, 1, 64), (7, 64, 1, 64), (7, 64, 1, 64)]
    for number, shape in enumerate(kernels):
        name = f"conv2d_{number}" if number else "conv2d"
        arrays[f"{name}/kernel"] = rand(*shape) / (shape[0] * shape[1]) ** 0.5
        arrays[f"{name}/bias"] = 0.1 * rand(shape[-1])
    for number, size in enumerate((1, 204, 204, 51, 51, 51, 64, 64, 64, 1506, 200)):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        arrays |= {f"{name}/gamma": rand(size), f"{name}/beta": rand(size), f"{name}/moving_mean": rand(size)}
        arrays[f"{name}/moving_variance"] = rand(size).square() + 0.5
    arrays |= {"dense/kernel": rand(1506, 200) / 40, "dense/bias": rand(200)}
    return arrays | {"dense_1/kernel": rand(200, 3) / 14, "dense_1/bias": rand(3)}


def reference_network(arrays: dict[str, torch.Tensor], mels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The network in numpy, for one spectrogram [187, 96], with channels last as in TensorFlow."""
    parts = {name: array.double().numpy() for name, array in arrays.items()}

    def norm(values, number):
        name = f"batch_normalization_{number}" if number else "batch_normalization"
        gamma, beta = parts[f"{name}/gamma"], parts[f"{name}/beta"]
        return gamma * (values - parts[f"{name}/moving_mean"]) / np.sqrt(parts[f"{name}/moving_variance"] + 1e-3) + beta

    def conv(image, number):
        """A valid convolution of [f, m] after padding in time, [f, m', c]."""
        name = f"conv2d_{number}" if number else "conv2d"
        kernel = parts[f"{name}/kernel"][:, :, 0]
        before = (kernel.shape[0] - 1) // 2
        padded = np.pad(image, ((before, kernel.shape[0] - 1 - before), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2])
        return np.maximum(np.tensordot(windows, kernel, axes=2) + parts[f"{name}/bias"], 0)

    image = norm(mels, 0)
    front = np.concatenate([norm(conv(image, k), k + 1).max(axis=1) for k in range(5)], axis=1)
    first = norm(conv(front, 5)[:, 0], 6)
    second = first + norm(conv(first, 6)[:, 0], 7)
    third = second + norm(conv(second, 7)[:, 0], 8)
    states = np.concatenate([front, first, second, third], axis=1)
    pooled = norm(np.stack([states.max(axis=0), states.mean(axis=0)], axis=1).reshape(-1), 9)
    embedding = norm(np.maximum(pooled @ parts["dense/kernel"] + parts["dense/bias"], 0), 10)
    return embedding, 1 / (1 + np.exp(-(embedding @ parts["dense_1/kernel"] + parts["dense_1/bias"])))


def test_network_agrees_with_numpy():
    """Embeddings and tags, for weights of both signs in every batch norm."""
    arrays = random_arrays()
    mels = torch.rand(1, 187, 96, generator=torch.Generator().manual_seed(1)) * 5
    embeddings, tags = converted_musicnn(arrays, ["a", "b", "c"])(mels)
    expected_embeddings, expected_tags = reference_network(arrays, mels[0].double().numpy())
    assert np.allclose(embeddings[0].numpy(), expected_embeddings, atol=1e-3)
    assert np.allclose(tags[0].numpy(), expected_tags, atol=1e-4)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published weights")
def test_published_weights_give_the_published_tags():
    """The tags of the TensorFlow graph for 3 s of a recording; the included weights are those of MagnaTagATune."""
    reference, labels = (
        load_file(PUBLISHED / "reference.safetensors"),
        json.loads((PUBLISHED / "labels.json").read_text()),
    )
    for name, tags in labels.items():
        network = converted_musicnn(load_file(PUBLISHED / f"{name}.safetensors"), tags)
        assert torch.allclose(network(reference["features"])[1], reference[f"{name}.tags"], rtol=0, atol=1e-5)
    included = bundled_musicnn()
    assert included.tags == labels["MTT_musicnn"]
    assert torch.allclose(included(reference["features"])[1], reference["MTT_musicnn.tags"], rtol=0, atol=1e-3)


def test_log_mels_agree_with_a_loop_over_filters():
    """Slaney mels of unit area over a centred power spectrum; a tone is loudest in the band of its frequency."""
    network = MusicNN(tags=["a"]).eval()
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)
    log_mels = network.log_mels(tone[None])
    assert log_mels.shape == (1, 63, 96)
    # The Slaney scale has 15 mels at 1000 Hz, and 42.2 (15 + 27 ln(8) / ln(6.4)) at 8000 Hz.
    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = np.linspace(0, top, 98)
    hz = np.where(edges < 15, edges * 200 / 3, 1000 * np.exp((edges - 15) * np.log(6.4) / 27))
    frame = np.pad(tone.numpy().astype(float), 256, mode="reflect")[20 * 256 : 20 * 256 + 512]
    power = np.abs(np.fft.rfft(frame * np.hanning(513)[:512])) ** 2
    bins = np.arange(257) * 16_000 / 512
    expected = []
    for low, middle, high in zip(hz[:-2], hz[1:-1], hz[2:]):
        triangle = np.interp(bins, [low, middle, high], [0, 1, 0]) * 2 / (high - low)
        expected.append(np.log10(10_000 * (triangle * power).sum() + 1))
    assert np.allclose(log_mels[0, 20].numpy(), expected, atol=1e-3)


@pytest.mark.slow
def test_windows_cover_the_clip():
    """One window up to 3 s (shorter clips are repeated), two for 5 s; silence and short clips have finite features."""
    extractor = MusicNNExtractor()
    generator = torch.Generator().manual_seed(0)
    for seconds, num_windows in ((0.5, 1), (2.0, 1), (5.0, 2)):
        features = extractor(torch.randn(1, int(seconds * 16_000), generator=generator) * 0.1)
        assert features.shape == (1, num_windows, 250) and features.isfinite().all()
    silence = extractor(torch.zeros(2, 48_000))
    assert silence.isfinite().all() and torch.equal(silence[0], silence[1])
    assert extractor.posteriors(silence[0]).sum() == pytest.approx(1.0, abs=1e-5)
