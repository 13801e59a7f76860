"""Watermarks with AudioSeal: small random weights in the published format, since the real ones need a network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from musiclm_pytorch.generation.watermark import AudioSealWatermark


class Marker(nn.Module):
    """Adds the same small tone to every wave, whose loudness encodes the message."""

    def get_watermark(self, wave: Tensor, message: Tensor) -> Tensor:
        tone = torch.sin(torch.arange(wave.shape[-1]) * 2.0)
        return 0.001 * (1 + message.double().mean(dim=1)).float()[:, None, None] * tone.expand_as(wave)


class Detector(nn.Module):
    """Finds the tone, and returns fixed bits."""

    nbits = 16

    def detect_watermark(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        tone = torch.sin(torch.arange(wave.shape[-1]) * 2.0)
        found = (wave[:, 0] @ tone / len(tone) > 3e-4).float()
        return found, (torch.arange(16) % 3 == 0).int().expand(len(wave), -1)


def test_a_watermark_is_added_to_all_channels_and_detected() -> None:
    """Of waves of any shape and rate; the message is a number of 16 bits, the first bit is the lowest."""
    watermark = AudioSealWatermark(Marker(), Detector(), message=5)
    for shape, sample_hz in (((8000,), 16_000), ((2, 8000), 16_000), ((2, 2, 12001), 24_000), ((1, 44100), 44_100)):
        wave = 0.1 * torch.sin(torch.arange(shape[-1]) * 0.05).expand(shape)
        marked = watermark(wave, sample_hz)
        assert marked.shape == wave.shape and 0 < float((marked - wave).abs().max()) < 0.01
        share, messages = watermark.detect(marked, sample_hz)
        assert share.shape == messages.shape == shape[:-1]
        assert bool((share == 1).all()) and set(messages.flatten().tolist()) == {sum(2**i for i in range(0, 16, 3))}
        assert not watermark.detect(wave, sample_hz)[0].any()
    for wrong in (-1, 2**16):
        with pytest.raises(ValueError, match=r"message must be in 0\.\.65535"):
            AudioSealWatermark(Marker(), Detector(), message=wrong)


def published(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """Write weights like those of facebook/audioseal, with weight norm in the old format; return the modules."""
    builder, loader = pytest.importorskip("audioseal.builder"), pytest.importorskip("audioseal.loader")
    config_of = loader.load_local_model_config

    def small(card: str) -> Any:
        config = config_of(card)
        config.seanet.update({"n_filters": 2, "dimension": 8, "ratios": [4, 2], "lstm": 1})
        return config

    monkeypatch.setattr(loader, "load_local_model_config", small)
    modules = {}
    for name, card, create, config in (
        ("generator", "audioseal_wm_16bits", builder.create_generator, builder.AudioSealWMConfig),
        ("detector", "audioseal_detector_16bits", builder.create_detector, builder.AudioSealDetectorConfig),
    ):
        modules[name] = create(loader.AudioSeal.parse_config(small(card), config)).eval()
        weights = {}
        for key, value in modules[name].state_dict().items():
            old = key.replace(".inner_conv", "")
            if key.endswith("inner_conv.weight"):
                norm = value.flatten(1).norm(dim=1).view(-1, 1, 1)
                weights |= {f"{old}_g": norm, f"{old}_v": value * 3.0}
            else:
                weights[old] = value
        torch.save({"xp.cfg": {"nbits": 16}, "model": weights}, folder / f"{name}_base.pth")
    return modules


@pytest.mark.slow
def test_published_weights_compute_the_watermark_of_audioseal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the modules of the package; a missing, truncated or foreign file is refused in one line."""
    modules = published(tmp_path, monkeypatch)
    watermark = AudioSealWatermark.from_pretrained(tmp_path, message=3)
    wave = 0.1 * torch.randn(2, 1, 3200)
    bits = torch.tensor([1, 1] + [0] * 14)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(watermark(wave, 16_000), modules["generator"](wave, message=bits))
        share, expected = modules["detector"].detect_watermark(wave)
    found, messages = watermark.detect(wave, 16_000)
    torch.testing.assert_close(found[:, 0], share)
    assert messages[:, 0].tolist() == [sum(int(bit) << i for i, bit in enumerate(row)) for row in expected]
    assert watermark(wave[:, :, :7], 16_000).shape == (2, 1, 7)

    path = tmp_path / "generator_base.pth"
    whole = path.read_bytes()
    torch.save({"model": {"encoder": torch.zeros(3)}}, tmp_path / "foreign")
    for content in (whole[: len(whole) // 2], b"", (tmp_path / "foreign").read_bytes(), None):
        path.write_bytes(content or b"")
        if content is None:
            path.unlink()
        with pytest.raises(ValueError, match="generator_base.pth") as caught:
            AudioSealWatermark.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line with the command to install it."""
    monkeypatch.setitem(__import__("sys").modules, "audioseal.builder", None)
    with pytest.raises(ImportError, match=r'pip install "musiclm\[watermark\]"'):
        AudioSealWatermark.from_pretrained(tmp_path)
