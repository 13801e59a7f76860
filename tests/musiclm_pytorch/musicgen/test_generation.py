"""Generation with MusicGen: the modes, prompts, seeds, batches and windows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.codecs import ChannelwiseCodec
from musiclm_pytorch.musicgen.musicgen import MusicGen

pytest.importorskip("transformers")

from tests.helpers.published_musicgen import VOCAB, oracle, write_musicgen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small mono model."""
    return write_musicgen(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> MusicGen:
    """A small mono model with windows of 0.8 s."""
    model = MusicGen.from_pretrained(folder)
    model.transformer.max_seconds = 0.8
    return model


@pytest.mark.parametrize(
    ("levels", "channels"),
    [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(4, 1, marks=pytest.mark.slow), (8, 2)],
)
@pytest.mark.parametrize("prompt_frames", [0, 5])
def test_grid_equals_the_delay_pattern_of_transformers(
    folder: Path, levels: int, channels: int, prompt_frames: int
) -> None:
    """Known cells, cells to predict and special cells, for several lengths."""
    from musiclm_pytorch.musicgen.transformer import MusicGenTransformer

    reference = oracle(folder).decoder
    reference.config.num_codebooks, reference.config.audio_channels = levels, channels
    reference.num_codebooks, reference.audio_channels = levels, channels
    own = MusicGenTransformer(
        dim=16, depth=1, heads=2, dim_head=8, codebook_size=VOCAB, num_codebooks=levels, num_groups=channels
    )
    for frames in (16, 17, 40):
        codes = torch.randint(VOCAB, (2, prompt_frames, levels))
        grid = own.layout.grid({"acoustic": codes}, {"acoustic": frames}, 2)
        first = [level * (VOCAB + 1) + 1 for level in range(levels)]
        ids = (grid.packed.ids - torch.tensor(first)).masked_fill(grid.packed.loss_mask, -1)
        start = torch.full((2 * levels, 1), VOCAB)
        prompt = torch.cat((start, codes.transpose(1, 2).flatten(0, 1)), dim=1)
        rows = 1 + frames + (levels - 1) // channels
        _, mask = reference.build_delay_pattern_mask(prompt, VOCAB, rows)
        assert torch.equal(ids.transpose(1, 2).flatten(0, 1), mask)


def test_item_of_a_batch_equals_the_item_alone(model: MusicGen) -> None:
    """Complaint: padding of texts changes results. Texts, no text and prompts of several lengths in one batch."""
    texts = ["slow piano ballad", None, "Fast violin jig with drums, a harp"]
    prompts: list[Any] = [torch.randn(3000) * 0.2, None, np.random.default_rng(0).normal(0, 0.2, (1, 7000)).astype("f")]
    together = model.generate(texts=texts, prompt=prompts, seconds=1.0, seeds=[5, 6, 7], top_k=20)
    assert together.tokens.shape == (3, 50, 4)
    for item in range(3):
        alone = model.generate(
            texts=texts[item : item + 1], prompt=prompts[item : item + 1], seconds=1.0, seeds=[5 + item], top_k=20
        )
        assert torch.equal(alone.tokens[0], together.tokens[item])
        torch.testing.assert_close(alone.waves[0], together.waves[item], atol=1e-5, rtol=1e-5)


def test_seeds_are_reproducible_and_differ(model: MusicGen) -> None:
    """Complaint: seeds are not reproducible. The global generator plays no part."""
    first = model.generate(texts="a harp", num_samples=2, seconds=0.4, seeds=3)
    torch.manual_seed(99)
    again = model.generate(texts="a harp", num_samples=2, seconds=0.4, seeds=[3, 4])
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens[0], first.tokens[1])


def test_a_str_is_one_text(model: MusicGen) -> None:
    """Complaint: a str is read letter by letter."""
    assert model("a harp", seconds=0.1, seed=0).shape == (1, 3200)
    assert model(["a harp", "drums"], seconds=0.1, seed=0).shape == (2, 3200)


def test_unconditional_generation(model: MusicGen) -> None:
    """Empty texts, None and no texts are the same, and need no guidance."""
    expected = model.generate(num_samples=2, seconds=0.3, seeds=0).tokens
    for texts in ("", [None, " "]):
        assert torch.equal(model.generate(texts=texts, num_samples=2, seconds=0.3, seeds=0).tokens, expected)


def test_prompts_as_file_tensor_and_array(model: MusicGen, tmp_path: Path) -> None:
    """Files have their own rate; the prompt is kept, and only its complete frames are used."""
    wave = (0.3 * torch.randn(2, 6500)).clamp(-0.9, 0.9)
    codes = model.codec.tokenize(wave)[:, :10]
    both = model.generate(prompt=wave, seconds=0.4, seeds=0)
    assert torch.equal(both.tokens[:, :10], codes)
    assert torch.equal(model.generate(prompt=list(wave.numpy()), seconds=0.4, seeds=0).tokens, both.tokens)
    write_audio(tmp_path / "start.wav", wave[0].repeat_interleave(2), 64000)
    music = model.generate(prompt=tmp_path / "start.wav", seconds=0.4, seeds=0)
    assert music.tokens.shape == (1, 20, 4)
    with pytest.raises(ValueError, match="longer than the requested"):
        model.generate(prompt=wave, seconds=0.1)


@pytest.mark.slow
def test_music_longer_than_a_window(model: MusicGen) -> None:
    """Complaint: 30-s limit. The first window is the shorter music, and later windows continue its end."""
    short = model.generate(texts="drums", seconds=0.8, seeds=1).tokens
    music = model.generate(texts="drums", seconds=2.0, seeds=1)
    assert music.tokens.shape == (1, 100, 4)
    assert torch.equal(music.tokens[:, :40], short)
    other = model.generate(texts="drums", seconds=2.0, seeds=1, stride_seconds=0.1).tokens
    assert torch.equal(other[:, :40], short)
    assert not torch.equal(other, music.tokens)


def test_texts_of_windows_change_the_music_of_their_window(model: MusicGen) -> None:
    """A list of texts in place of a text; the last text stays."""
    same = model.generate(texts=[["drums", "drums"]], seconds=1.0, seeds=1).tokens
    assert torch.equal(same, model.generate(texts="drums", seconds=1.0, seeds=1).tokens)
    changed = model.generate(texts=[["drums", "slow piano"]], seconds=1.0, seeds=1).tokens
    assert torch.equal(changed[:, :40], same[:, :40])
    assert not torch.equal(changed, same)


def test_guidance_is_cond_minus_null(model: MusicGen) -> None:
    """Scale 0 ignores the text, and scale 1 uses only the text."""
    options: dict[str, Any] = {"seconds": 0.3, "temperature": 0}
    nothing = model.generate(**options).tokens
    assert torch.equal(model.generate(texts="drums", guidance_scale=0, **options).tokens, nothing)
    assert not torch.equal(model.generate(texts="drums", guidance_scale=3, **options).tokens, nothing)


def test_fade_out_callback_and_progress(model: MusicGen) -> None:
    """Complaint: no proper ending. The callback receives frames of the longest item."""
    calls: list[tuple[int, int]] = []
    plain = model.generate(seconds=0.4, seeds=0, callback=lambda *counts: calls.append(counts))
    faded = model.generate(seconds=0.4, seeds=0, fade_out_seconds=0.1, progress=True)
    assert calls[-1] == (20, 20)
    assert torch.equal(faded.waves[0][:9600], plain.waves[0][:9600])
    assert faded.waves[0][-1] == 0
    offline = calls.copy()
    calls.clear()
    list(model.stream(seconds=0.4, seeds=0, chunk_seconds=0.1, callback=lambda *counts: calls.append(counts)))
    assert calls == offline


def test_wrong_inputs_raise_errors(model: MusicGen) -> None:
    """The messages name the input."""
    with pytest.raises(ValueError, match="different numbers of items"):
        model.generate(texts=["a", "b"], seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="no melody condition"):
        model.generate(melody=torch.zeros(1000))
    for name in ("prompt", "melody"):
        with pytest.raises(ValueError, match=f"got {name}_sample_hz without {name}"):
            model.generate(**{f"{name}_sample_hz": 8000})
    with pytest.raises(ValueError, match="seconds must be positive"):
        model.generate(seconds=0)
    with pytest.raises(ValueError, match="multiple of heads"):
        MusicGen(codec=model.codec, dim=10, heads=3)
    for name, value in (("heads", 0), ("dim", 0), ("max_seconds", 0.0), ("max_seconds", torch.inf)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            MusicGen(codec=model.codec, **{"dim": 8, "depth": 1, "heads": 2, name: value})
    for fade in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="fade_out_seconds must be"):
            model.generate(seconds=0.2, fade_out_seconds=fade)
    with pytest.raises(ValueError, match="no text condition"):
        MusicGen(codec=model.codec, dim=8, depth=1, heads=2).generate(texts="drums")
    with pytest.raises(ValueError, match="stride"):
        model.generate(seconds=2.0, stride_seconds=0.9)


def test_new_model_with_stereo(model: MusicGen) -> None:
    """Complaint: stereo errors. Codes of both channels have equal delays; prompts and results are stereo."""
    stereo = MusicGen(
        codec=ChannelwiseCodec(model.codec), text_conditioner=model.text_conditioner, dim=16, depth=1, heads=2
    )
    assert stereo.transformer.layout.predicted[0].num_groups == 2
    wave = 0.2 * torch.randn(2, 6400)
    music = stereo.generate(texts="a harp", prompt=[wave], seconds=0.4, seeds=0)
    assert music.waves[0].shape == (2, 12800)
    left, right = (stereo.codec.codec.tokenize(channel.unsqueeze(0)) for channel in wave)
    assert torch.equal(music.tokens[:, :10], torch.stack((left, right), dim=-1).flatten(2))


@pytest.mark.slow
def test_long_sequences_in_bfloat16_are_finite(folder: Path) -> None:
    """Complaints: NaN with the null condition in bf16; crash beyond 2,048 rows."""
    model = MusicGen.from_pretrained(folder)
    model.transformer.bfloat16()
    packed = model.transformer.layout.pack({"acoustic": torch.randint(VOCAB, (1, 2100, 4))})
    with torch.no_grad():
        hidden = model.transformer.hidden(packed.ids, packed.input_mask, model.transformer.fuse({}, 1))
    assert hidden.isfinite().all()
    assert model.generate(texts=["drums", None], seconds=0.2, seeds=0).tokens.shape == (2, 10, 4)


@pytest.mark.parametrize("kind", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("mono", "stereo")), "melody"])
def test_stream_equals_generate(tmp_path: Path, kind: str) -> None:
    """Three windows with a prompt: equal tokens, and waves without noise at the ends of chunks or of the music."""
    channels = 2 if kind == "stereo" else 1
    model = MusicGen.from_pretrained(write_musicgen(tmp_path, channels=channels, melody=kind == "melody"))
    model.transformer.max_seconds = 0.8
    prompt = [0.2 * torch.randn(channels, 4000), None]
    options: dict[str, Any] = {"texts": ["drums", "a harp"], "prompt": prompt, "seconds": 1.7, "seeds": 4}
    if kind == "melody":
        options["melody"] = [[(57, 0.0, 0.4), (62, 0.4, 1.0)], None]
    whole = model.generate(**options)
    for chunk_seconds in (0.1, 1.0):
        chunks = list(model.stream(**options, chunk_seconds=chunk_seconds))
        assert len(chunks) > 1
        for item in range(2):
            tokens = torch.cat([chunk.tokens[item][chunk.tokens[item, :, 0] >= 0] for chunk in chunks])
            assert torch.equal(tokens, whole.tokens[item])
            wave = torch.cat([chunk.waves[item] for chunk in chunks], dim=-1)
            torch.testing.assert_close(wave, whole.waves[item], atol=1e-5, rtol=1e-5)
