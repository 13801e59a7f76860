import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.crops import CropDataset
from audiolm_pytorch.data.manifest import AudioItem
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.quantizer import fit as quantizer_fit
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.quantizer.fit import QuantizerReport, fit_quantizer, measure_quantizer
from tests.helpers.tiny_mulan import tiny_mulan, tones


def _at(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class Loudness(JointEmbedding):
    """Places sound on a circle by its loudness, and a text by the loudness it names, on a smaller circle elsewhere."""

    def __init__(self) -> None:
        super().__init__(dim_latent=2, sample_hz=8000, window_seconds=0.5, window_stride_seconds=0.25)
        self.num_windows = 0

    def get_audio_latents(self, wavs: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.num_windows += len(wavs)
        counts = torch.full((len(wavs),), wavs.shape[1]) if lengths is None else lengths
        return _at(3 * wavs.abs().sum(dim=1) / counts)

    def get_text_latents(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        return 0.7 * _at(torch.tensor([3 * float(text.split()[-1]) for text in texts])) + 1.5


def _quantizer(mulan: JointEmbedding | None = None, levels: int = 2, size: int = 4) -> MuLaNEmbedQuantizer:
    return MuLaNEmbedQuantizer(
        mulan=mulan or Loudness(),
        conditioning_dims=(8,),
        namespaces=("semantic",),
        rq_num_quantizers=levels,
        codebook_size=size,
    )


def _steps(folder: Path, count: int, seconds: float = 0.5, louder: float = 0.0) -> list[AudioItem]:
    """Constant sounds of rising loudness, each with two captions that name it; `louder` a window later within each."""
    items = []
    for index in range(count):
        rise = louder * torch.arange(round(seconds * 8000)).div(2000, rounding_mode="floor")
        level = 0.1 + 0.8 * index / count
        write_audio(folder / f"{index}.wav", (level + rise).clamp(max=0.99), 8000)
        labels = {"captions": [f"loudness of {level}", f"a sound of {level}"]}
        items.append(AudioItem(folder / f"{index}.wav", None, labels, 8000, round(seconds * 8000)))
    return items


def test_metrics_equal_naive_loops() -> None:
    """Oracle: counts in Python for usage, perplexity, agreement and chance, and sums of squares for what is left."""
    torch.manual_seed(0)
    quantizer = _quantizer(tiny_mulan(), levels=3, size=5)
    audio = torch.nn.functional.normalize(torch.randn(30, 16), dim=-1)
    clip_index = torch.randint(30, (70,))
    text = torch.nn.functional.normalize(0.7 * audio[clip_index] + 0.3 * torch.randn(70, 16), dim=-1)
    quantizer.fit(audio, text, clip_index=clip_index)
    report = measure_quantizer(quantizer, audio, text, clip_index=clip_index)
    audio_codes, text_codes = quantizer.codes(latents=audio), quantizer.codes_from_latents(text, "text")
    assert (report.num_windows, report.num_pairs, report.is_held_out) == (30, 70, False)
    left = (audio - audio.mean(dim=0)).double()
    spread = left.square().sum()
    for level in range(3):
        own, said = audio_codes[:, level].tolist(), text_codes[:, level].tolist()
        counts = Counter(own)
        entropy = -sum(count / 30 * math.log(count / 30) for count in counts.values())
        assert report.usage[level] == pytest.approx(len(counts) / 5)
        assert report.perplexity[level] == pytest.approx(math.exp(entropy))
        of_text = [own[owner] for owner in clip_index.tolist()]
        assert report.agreement[level] == pytest.approx(sum(a == t for a, t in zip(of_text, said)) / 70)
        assert report.chance[level] == pytest.approx(sum(a == t for a in of_text for t in said) / 70**2)
        left = left - quantizer.codebooks[level].double()[own]
        assert report.explained[level] == pytest.approx(float(1 - left.square().sum() / spread), abs=1e-6)
    assert 1 > report.agreement[0] > report.chance[0] + 0.15


def test_metrics_have_names() -> None:
    """The metrics have every number; agreement and chance of the first level come first."""
    report = QuantizerReport(9, 4, True, (1.0, 0.5), (3.0, 1.5), (0.75, 0.875), (0.5, 0.25), (0.125, 0.25))
    assert list(report.metrics.items())[:4] == [
        ("agreement_level_1", 0.5),
        ("chance_level_1", 0.125),
        ("explained", 0.875),
        ("least_usage", 0.5),
    ]
    assert len(report.metrics) == 2 + 5 * 2
    assert report.metrics["perplexity_level_2"] == 1.5
    bare = replace(report, agreement=(), chance=())
    assert list(bare.metrics)[0] == "explained"


def test_files_are_fitted_and_their_captions_agree(tmp_path: Path) -> None:
    """Captions that match the audio have the codes of its windows, despite the modality gap, also in long files."""
    items = _steps(tmp_path, 12, seconds=1.2)
    quantizer = _quantizer()
    report = fit_quantizer(quantizer, items)
    assert bool(quantizer.fitted) and not report.is_held_out
    assert (report.num_windows, report.num_pairs) == (12 * 3, 12 * 2)
    assert report.usage == (1.0, 1.0) and report.explained[1] > 0.95
    assert report.agreement[0] > 0.9 and report.agreement[0] > report.chance[0] + 0.5


def test_every_window_is_embedded_as_mulan_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `window_latents` of file after file, whatever their lengths; captions take turns at their own windows."""
    for index, seconds in enumerate((0.7, 0.3, 1.31, 0.5)):
        write_audio(tmp_path / f"{index}.wav", tones(200 * (1 + index), seconds=seconds)[0], 8000)
    lengths = (5600, 2400, 10480, 4000)
    items = [
        AudioItem(tmp_path / f"{i}.wav", "a", {"captions": ["b", "c"]}, 8000, length)
        for i, length in enumerate(lengths)
    ]
    quantizer, given = _quantizer(tiny_mulan()), {}
    fit = MuLaNEmbedQuantizer.fit

    def noted(self: MuLaNEmbedQuantizer, audio: Tensor, text: Tensor, **settings: Tensor) -> None:
        given.update(audio=audio, text=text, clip_index=settings["clip_index"])
        fit(self, audio, text, **settings)

    monkeypatch.setattr(MuLaNEmbedQuantizer, "fit", noted)
    monkeypatch.setattr(quantizer_fit, "_BATCH_SIZE", 3)
    fit_quantizer(quantizer, items)
    dataset = CropDataset(items, None, (8000,))
    with torch.no_grad():
        expected = [quantizer.mulan.window_latents(dataset.get(0, index).waves[8000]) for index in range(4)]
        text = quantizer.mulan.get_text_latents(["a", "b", "c"] * 4)
    assert [len(part) for part in expected] == [1, 1, 4, 1]
    torch.testing.assert_close(given["audio"], torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(given["text"], text, atol=1e-5, rtol=0)
    assert given["clip_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 6, 6, 6]


@pytest.mark.slow
def test_held_out_files_are_what_is_measured(tmp_path: Path) -> None:
    """Agreement is measured on held-out captions, usage on the fitted files; captions are optional."""
    items, others = _steps(tmp_path / "train", 12), _steps(tmp_path / "valid", 5)
    wrong = [replace(item, labels={"captions": ["loudness of 0.05"]}) for item in others]
    fitted = fit_quantizer(_quantizer(), items)
    right, wrong_report = (fit_quantizer(_quantizer(), items, held_out=held) for held in (others, wrong))
    assert right.is_held_out and right.num_pairs == 10 and right.agreement[0] > 0.8 > 0.5 > wrong_report.agreement[0]
    assert (right.usage, right.perplexity, right.num_windows) == (fitted.usage, fitted.perplexity, 12)
    silent = [replace(item, labels={}) for item in others]
    assert fit_quantizer(_quantizer(), items, held_out=silent) == fitted
    bare = fit_quantizer(_quantizer(), [replace(item, labels={}) for item in items], held_out=silent)
    assert bare.is_held_out and bare.agreement == () and len(bare.explained) == 2


def test_captions_of_some_files_count_only_if_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions are used only if enough files have some, since the mean of a few is not the mean of texts."""
    items = _steps(tmp_path, 12)
    some = [item if index % 2 else replace(item, labels={}) for index, item in enumerate(items)]
    assert fit_quantizer(_quantizer(), some).agreement == ()
    monkeypatch.setattr(quantizer_fit, "_MIN_CAPTIONED_FILES", 6)
    report = fit_quantizer(_quantizer(), some)
    assert report.num_pairs == 12 and report.agreement[0] > 0.9


def test_no_more_windows_are_embedded_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large corpus as many windows and captions as asked for are drawn, by the seed; other files are not read."""
    items = _steps(tmp_path, 12, seconds=1.5, louder=0.01)
    reads: list[int] = []
    get = CropDataset.get

    def counted(self: CropDataset, epoch: int, index: int) -> object:
        reads.append(index)
        return get(self, epoch, index)

    monkeypatch.setattr(CropDataset, "get", counted)
    quantizer = _quantizer()
    report = fit_quantizer(quantizer, items, max_windows=8)
    assert report.num_windows == quantizer.mulan.num_windows == 8 and report.num_pairs <= 8
    assert reads == sorted(set(reads)) and len(reads) <= 8
    books = [quantizer.codebooks]
    for seed in (0, 1):
        books.append((other := _quantizer()).codebooks)
        fit_quantizer(other, items, max_windows=8, seed=seed)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_nothing_is_read_for_a_fit_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few windows, or a quantizer that is fitted, are found before hours are spent on embedding."""
    items, quantizer = _steps(tmp_path, 3), _quantizer()
    with monkeypatch.context() as patch:
        patch.setattr(CropDataset, "get", lambda *_: pytest.fail("a file was read"))
        with pytest.raises(ValueError, match=r"3 audio_latents are too few for 4 codes.*smaller codebook_size"):
            fit_quantizer(quantizer, items)
        with pytest.raises(ValueError, match="0 audio_latents are too few"):
            fit_quantizer(quantizer, [])
    assert not quantizer.fitted
    fit_quantizer(_quantizer(size=3), items)
    quantizer.fitted.fill_(True)
    monkeypatch.setattr(CropDataset, "get", lambda *_: pytest.fail("a file was read"))
    with pytest.raises(ValueError, match="already"):
        fit_quantizer(quantizer, items)


def test_unused_codes_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Similar recordings leave most codes of a later level unused, and the log reports the level and a fix."""
    items = _steps(tmp_path, 4)
    with caplog.at_level(logging.WARNING):
        fit_quantizer(_quantizer(levels=1), items)
        assert not caplog.records
        fit_quantizer(_quantizer(levels=3), [*items, *items])
    assert [record.message for record in caplog.records if "level 2 uses 25% of its 4 codes" in record.message]
