import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import ConditionTensor
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.evaluation.classifier import (
    INVERSE_REGULARISATION,
    AttributeClassifier,
    fit_attribute_classifier,
)
from musiclm_pytorch.evaluation.clip_features import ClipFeatures
from musiclm_pytorch.evaluation.clips import labels_of, load_clips
from musiclm_pytorch.mulan.joint import JointEmbedding
from musiclm_pytorch.recipes.metrics.generation_metrics import code_agreement_metrics, from_captions, other_clips
from musiclm_pytorch.recipes.metrics.model_metrics import CaptionedClips, Settings, measure

SAMPLE_HZ = 16_000
SECONDS = 3.0
PITCHES_HZ = {"flute": 1200.0, "cello": 220.0}
BEATS_HZ = {"slow": 1.5, "fast": 5.0}


def played(instrument: str, tempo: str, generator: torch.Generator) -> torch.Tensor:
    """Decaying notes [n]: pitch and overtones make the instrument, their rate the tempo."""
    time = torch.arange(round(SECONDS * SAMPLE_HZ)) / SAMPLE_HZ
    detune, start, level = torch.rand(3, generator=generator).tolist()
    pitch_hz = PITCHES_HZ[instrument] * (0.9 + 0.2 * detune)
    since_onset = (time * BEATS_HZ[tempo] + start) % 1.0
    tone = sum(torch.sin(2 * math.pi * k * pitch_hz * time) / k for k in (1, 2, 3))
    noise = 1e-3 * torch.randn(time.shape, generator=generator)
    return (0.05 + 0.25 * level) * (torch.exp(-4 * since_onset) * tone + noise)


def tones(count: int, seed: int) -> tuple[torch.Tensor, dict[str, list[str]]]:
    """Waves [b, n] with labels, the four combinations in turn."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [(instrument, tempo) for instrument in PITCHES_HZ for tempo in BEATS_HZ]
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    waves = torch.stack([played(*pair, generator) for pair in chosen])
    return waves, {"instrument": [pair[0] for pair in chosen], "tempo": [pair[1] for pair in chosen]}


@pytest.fixture(scope="module")
def classifier() -> AttributeClassifier:
    waves, labels = tones(24, seed=0)
    features = ClipFeatures()
    return AttributeClassifier.fit(features(waves, SAMPLE_HZ), labels, features)


@pytest.mark.slow
def test_classifier_finds_instrument_and_tempo_of_new_tones(classifier):
    """Timbre and tempo of clips that it was not fitted to, also at another sample rate."""
    waves, labels = tones(12, seed=1)
    assert classifier.predict(waves, SAMPLE_HZ) == labels
    other_rate = torch.nn.functional.interpolate(waves[:, None], scale_factor=2, mode="linear")[:, 0]
    assert classifier.predict(other_rate, 2 * SAMPLE_HZ) == labels
    for name, chances in classifier.predict_proba(waves, SAMPLE_HZ).items():
        assert chances.shape == (12, len(classifier.classes[name]))
        assert torch.allclose(chances.sum(dim=1), torch.ones(12))


@pytest.mark.slow
def test_classifier_agrees_with_scikit_learn():
    """Equal probabilities, for two classes (one row of weights in scikit-learn) and for three."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator)
    three = [("a", "b", "c")[int(x)] for x in (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()]
    two = ["yes" if x > 0 else "no" for x in inputs[:, 2]]
    fitted = AttributeClassifier.fit(inputs, {"three": three, "two": two}, ClipFeatures())
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).clamp(-4, 4).double().numpy()
    for name, names in (("three", three), ("two", two)):
        oracle = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=500, class_weight="balanced").fit(inputs, names)
        own = fitted.heads[name](torch.from_numpy(inputs).float()).softmax(dim=-1)
        assert fitted.classes[name] == list(oracle.classes_)
        assert np.allclose(own.numpy(), oracle.predict_proba(inputs), atol=1e-4)


def test_classifier_is_saved_without_pickle(classifier, tmp_path):
    """Safetensors and JSON alone, with equal probabilities after loading."""
    save_module(classifier, tmp_path / "classifier")
    assert {path.suffix for path in (tmp_path / "classifier").iterdir()} == {".safetensors", ".json"}
    waves, _ = tones(4, seed=2)
    again = load_module(tmp_path / "classifier").predict_proba(waves, SAMPLE_HZ)
    for name, chances in classifier.predict_proba(waves, SAMPLE_HZ).items():
        assert torch.equal(again[name], chances)


def test_features_ignore_level_and_inaudible_noise_and_other_rows():
    """Scaling and the other rows change nothing, noise 60 dB below the music almost nothing."""
    waves, _ = tones(3, seed=3)
    features = ClipFeatures()
    inputs = features(waves)
    assert torch.allclose(features(0.01 * waves), inputs, atol=1e-3)
    assert torch.allclose(features(waves[1:2]), inputs[1:2], atol=1e-4)
    rms = waves.square().mean().sqrt()
    faint = 1e-3 * rms * torch.randn(waves.shape, generator=torch.Generator().manual_seed(0))
    spread = (inputs - inputs.mean(0)).norm()
    assert (features(waves + faint) - inputs).norm() < 0.05 * spread


def test_features_of_silence_are_finite_and_bad_waves_raise():
    """Silence has finite features, NaN and too short waves raise an error."""
    features = ClipFeatures()
    assert torch.isfinite(features(torch.zeros(1, 3 * SAMPLE_HZ))).all()
    with pytest.raises(ValueError, match="pass longer clips"):
        features(torch.zeros(1, SAMPLE_HZ))
    with pytest.raises(ValueError, match="finite"):
        features(torch.full((1, 3 * SAMPLE_HZ), math.nan))


def written_items(folder, count: int, seed: int, **extra) -> list[AudioItem]:
    """Tones as files of a manifest."""
    waves, labels = tones(count, seed)
    items = []
    for i, wave in enumerate(waves):
        path = folder / f"{seed}-{i}.wav"
        write_audio(path, wave, SAMPLE_HZ)
        own = {name: names[i] for name, names in labels.items()}
        items.append(AudioItem(path, f"{own['tempo']} {own['instrument']}", own | extra, SAMPLE_HZ, len(wave)))
    return items


@pytest.mark.slow
def test_classifier_fits_on_files(tmp_path):
    """Fitting to the files of a manifest, which are padded to five seconds, is deterministic."""
    items = written_items(tmp_path, 8, seed=4)
    first = fit_attribute_classifier(items, ("instrument", "tempo"))
    second = fit_attribute_classifier(items, ("instrument", "tempo"))
    assert torch.equal(first.heads["tempo"].weight, second.heads["tempo"].weight)
    waves = load_clips(items, SAMPLE_HZ)
    assert waves.shape == (8, 5 * SAMPLE_HZ)
    assert first.predict(waves, SAMPLE_HZ)["instrument"] == labels_of(items, "instrument")


def test_labels_as_text(tmp_path):
    """A boolean is yes or no; the message for a missing label names the file."""
    item = AudioItem(tmp_path / "a.wav", None, {"drums": True}, 8000, 8)
    assert labels_of([item], "drums") == ["yes"]
    with pytest.raises(ValueError, match="a.wav"):
        labels_of([item], "tempo")


def test_code_agreement_has_the_chance_of_unrelated_captions():
    """The value is the share of equal codes; the chance of a level with a single code is one."""
    audio = torch.tensor([[0, 1, 5], [1, 1, 5], [2, 1, 5], [3, 1, 5]])
    text = torch.tensor([[0, 1, 6], [1, 1, 6], [2, 1, 6], [0, 1, 6]])
    metrics = code_agreement_metrics("codes", audio, text)
    assert [metric.value for metric in metrics] == [0.75, 1.0, 0.0]
    assert [metric.chance for metric in metrics] == [4 / 16, 1.0, 0.0]


def test_other_clips_are_never_the_same_clip():
    """The control never pairs a generation with its own caption."""
    for count in (2, 3, 50):
        others = other_clips(count, seed=count)
        assert sorted(others) == list(range(count))
        assert all(place != other for place, other in enumerate(others))


class SignCodec(Codec):
    """A frame is a sample, and its code the 16-bit value."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = SAMPLE_HZ, 1, 1, 1, 65_536

    def fingerprint(self) -> str:
        return "test"

    def tokenize(self, wave, lengths=None):
        return ((wave * 32_767).round().long() + 32_768)[..., None]

    def decode_from_codebook_indices(self, codes, num_samples=None):
        return ((codes[..., 0] - 32_768) / 32_767)[:, None, :num_samples]


class FakeMuLaN(JointEmbedding):
    """Recognises pitch and tempo of the tones, and their words in captions."""

    config: dict = {}

    def __init__(self) -> None:
        super().__init__(dim_latent=4, sample_hz=SAMPLE_HZ)

    def get_audio_latents(self, wavs, lengths=None):
        crossings = (wavs[:, 1:].sign() != wavs[:, :-1].sign()).float().mean(dim=1)
        envelope = wavs.abs().unfold(1, 400, 400).amax(dim=2)
        rises = ((envelope[:, 1:] > 2 * envelope[:, :-1]) & (envelope[:, 1:] > 0.02)).sum(dim=1)
        return self.latents(crossings < 0.08, rises > 8)

    def get_text_latents(self, texts):
        cello, fast = (torch.tensor([word in text for text in texts]) for word in ("cello", "fast"))
        return self.latents(cello, fast)

    def latents(self, is_cello, is_fast):
        return torch.nn.functional.one_hot(2 * is_cello.long() + is_fast.long(), 4).float()


class FakeMusicLM:
    """Plays the instrument and tempo of the caption, or of the codes."""

    sample_hz = SAMPLE_HZ
    conditioned = ("semantic", "coarse", "fine")

    def __init__(self) -> None:
        self.mulan_embed_quantizer = self
        self.mulan = FakeMuLaN()
        self.audio_lm = self.AudioLM()

    class AudioLM:
        codec = SignCodec()

        def __call__(self, batch_size, seconds, conditioning, seeds):
            assert set(conditioning) == {"semantic", "coarse", "fine"}
            assert len(set(seeds)) == batch_size
            codes = conditioning["coarse"]["codes"].embeddings[:, 0].long()
            words = [(list(PITCHES_HZ)[a], list(BEATS_HZ)[b]) for a, b in codes.tolist()]
            return torch.stack([played(*pair, torch.Generator().manual_seed(s)) for pair, s in zip(words, seeds)])

    def parameters(self):
        return iter(())

    buffers = parameters

    def codes_from_latents(self, latents, modality):
        best = latents.argmax(dim=1)
        return torch.stack([best // 2, best % 2], dim=1)

    def conditioning(self, codes, namespace):
        return ConditionTensor(codes.float().unsqueeze(1), torch.ones(len(codes), 1, dtype=torch.bool))

    def __call__(self, texts, *, num_samples, seconds, seeds, max_batch, return_all):
        words = [text.split()[::-1] for text in texts]
        waves = [[played(*pair, torch.Generator().manual_seed(s)) for s in seeds] for pair in words]
        rows = torch.stack([torch.stack(row) for row in waves])
        return SimpleNamespace(waves=rows, best=rows[:, -1])


@pytest.mark.slow
def test_metrics_of_a_model_that_follows_its_prompts(classifier, tmp_path):
    """A fake model that follows every prompt has accuracy 1, and its shuffled control has not."""
    clips = CaptionedClips(
        "toy", written_items(tmp_path, 8, seed=6), written_items(tmp_path, 16, seed=7, held_out_pair=True)
    )
    settings = Settings(seconds=SECONDS, num_samples=2, batch_size=5)
    metrics = {metric.name: metric for metric in measure(FakeMusicLM(), classifier, clips, settings)}
    for condition in ("real", "codec copies", "from audio, N = 1", "from captions, N = 2", "from captions, N = 1"):
        assert metrics[f"labels / toy, {condition} / instrument, accuracy"].value == 1.0
        unseen = f"labels / toy, {condition}, pairs unseen in training / tempo, balanced accuracy"
        assert metrics[unseen].value == 1.0
    shuffled = "labels / toy, from captions, N = 2, shuffled captions (must be chance) / instrument, accuracy"
    assert metrics[shuffled].value < 0.9
    assert metrics["retrieval (MuLan) / toy, from captions, N = 2 / R@1"].count == 4
    assert metrics["MuLan codes of text and audio agree / toy, real / level 2"].value == 1.0
    assert "real" in metrics["nearest training clip (melody) / toy, from captions, N = 2 / mean"].note
    assert metrics["beat / toy, codec copies / onsets follow the real clip"].value > 0.99


def test_generations_that_are_not_finite_count_as_silence(classifier, caplog):
    """A NaN candidate is a wrong answer and a warning, and does not change the other answers."""

    class Broken(FakeMusicLM):
        def __call__(self, texts, **settings):
            made = super().__call__(texts, **settings)
            made.waves[0, 0, 100] = math.nan
            return made

    songs = from_captions(Broken(), ["slow cello", "fast flute"], SECONDS, num_samples=2, batch_size=4)
    assert songs.first[0].abs().max() == 0 < songs.first[1].abs().max()
    assert "1 of 2" in caplog.text
    assert classifier.predict(songs.first, SAMPLE_HZ)["tempo"][1] == "fast"
