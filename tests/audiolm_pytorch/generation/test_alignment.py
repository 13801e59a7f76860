"""Click tracks are cropped, packed, decoded and windowed. The clicks keep their times."""

import weakref

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.data import TokenShards, load_items, write_shards
from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.training_data import ShardSource, WaveSource
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from audiolm_pytorch.tokens.streams import Stream
from tests.helpers.decoding import decode_in_windows
from tests.helpers.fakes import SIZES, FakeSemanticTokenizer

PATTERNS = ["flat", "delayed", "parallel"]
FILE_HZ, TOKENIZER_HZ, CODEC_HZ = 8000, 1600, 3200  # different rates
CODEC_FRAME, TOKEN_FRAME, BUCKET = 64, 64, 8  # samples: 20 ms of the codec, 40 ms and 5 ms of the tokenizer
GREEDY = SamplingSettings(temperature=0)
# Each click is in the middle third of a codec frame, so that a resampled click stays inside the frame.
CLICKS = torch.tensor(
    [0.011, 0.092, 0.148, 0.271, 0.532, 0.569, 0.612, 0.831, 0.929, 1.049, 1.212, 1.310, 1.588, 1.869]
)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def click_track(times: Tensor, seconds: float, sample_hz: int) -> Tensor:
    """Short bumps at `times`, `[n]`. They last a few milliseconds, so that any rate can represent them."""
    at = torch.arange(round(seconds * sample_hz)) / sample_hz
    return torch.exp(-(((at[:, None] - times) / 0.0006) ** 2)).sum(dim=1)


def peaks(wave: Tensor, samples_per_frame: int) -> Tensor:
    """Sample of the click in every frame of waves `[b, n]`, `[b, f]`; -1 without a click."""
    wave = nn.functional.pad(wave, (0, -wave.shape[-1] % samples_per_frame))
    height, place = wave.unfold(-1, samples_per_frame, samples_per_frame).max(dim=-1)
    return torch.where(height > 0.5 * wave.max(), place, -1)


class ClickCodec(Codec):
    """50 frames of 4 levels per second: three levels hold the position of the click, the last one is a checksum."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = CODEC_HZ, CODEC_FRAME, 1, 4, 8

    def fingerprint(self) -> str:
        return "clicks"

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        place = peaks(wave[:, 0] if wave.ndim == 3 else wave, CODEC_FRAME)
        levels = [1 + place // 16, place // 4 % 4, place % 4]
        return torch.stack([*levels, sum(levels) % 8], dim=-1) * (place >= 0).unsqueeze(-1)

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        wave = torch.zeros(len(codes), codes.shape[1] * CODEC_FRAME)
        for item, frame in codes.any(dim=-1).nonzero().tolist():
            quarter, digit, last, check = codes[item, frame].tolist()
            is_whole = quarter > 0 and check == (quarter + digit + last) % 8
            wave[item, frame * CODEC_FRAME + 16 * (quarter - 1) + 4 * digit + last] = 1.0 if is_whole else -1.0
        return wave[:, None, :num_samples]


class ClickTokenizer(FakeSemanticTokenizer):
    """25 tokens per second with the eighth of the frame that has the click; drops frames at the end, like HuBERT."""

    target_sample_hz, downsample_factor, codebook_size = TOKENIZER_HZ, TOKEN_FRAME, 9

    def fingerprint(self) -> str:
        return "eighths"

    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        place = peaks(wave, TOKEN_FRAME)[:, : self.num_frames(wave.shape[-1])]
        return torch.where(place >= 0, 1 + place // BUCKET, 0)


def semantic_times(tokens: Tensor) -> Tensor:
    """Times in seconds of the clicks in semantic tokens `[t]`, each with an error of at most 2.5 ms."""
    frame = tokens.nonzero().flatten()
    return (frame * TOKEN_FRAME + (tokens[frame] - 1) * BUCKET + BUCKET / 2) / TOKENIZER_HZ


def acoustic_times(codes: Tensor) -> Tensor:
    """Times in seconds of the clicks in codes `[f, 4]`. All codes of a click must agree."""
    wave = ClickCodec().decode_from_codebook_indices(codes[None])[0, 0]
    assert (wave >= 0).all(), "levels of different frames were put together"
    return wave.nonzero().flatten() / CODEC_HZ


def stages(**options):
    sizes = {**SIZES, **options}
    pattern = sizes.pop("pattern", "delayed")
    return {
        "semantic": CopyingSemantic(num_semantic_tokens=9, eos=False, **sizes),
        "coarse": CopyingCoarse(
            num_semantic_tokens=9, codebook_size=8, num_coarse_quantizers=2, pattern=pattern, **sizes
        ),
        "fine": CopyingFine(num_coarse_quantizers=2, num_fine_quantizers=2, codebook_size=8, pattern=pattern, **sizes),
    }


def close(result: Tensor, expected: Tensor, seconds: float) -> bool:
    return result.shape == expected.shape and bool(((result - expected).abs() <= seconds).all())


# crops


def unpacked(stage, read):
    """Training tokens of a stage by stream name, unpacked from the grid, and the frames of each item."""
    streams, lengths = stage.streams_of(read.tokens)
    return stage.layout.unpack(stage.packed(read.tokens, read.ends).ids, lengths), lengths


def check_rows(stage, packed):
    """The row that predicts a frame with a click is preceded by the semantic token of the same click."""
    source, target = stage.layout.streams[0], stage.layout.heads[0]
    num_clicks = 0
    column = int(packed.loss_mask[0].any(dim=0).nonzero()[0])
    for item, row in packed.loss_mask[:, :, column].nonzero().tolist():
        quarter = int(packed.ids[item, row, column]) - target.first_id
        semantic = int(packed.ids[item, row - 1, 0]) - 1  # the ids of the input stream follow the start id
        assert 0 <= semantic < source.vocab_size
        if quarter:
            assert semantic and (semantic - 1) % 4 == quarter - 1
            num_clicks += 1
    return num_clicks


@every_pattern
@pytest.mark.parametrize("lost_frames", [0, 1])
def test_crops_of_waves_have_the_same_clicks_in_every_stream(tmp_path, pattern, lost_frames):
    """Crops of one file at two rates start at the same time, for all patterns."""
    soundfile.write(tmp_path / "clicks.wav", 0.9 * click_track(CLICKS, 2.0, FILE_HZ).numpy(), FILE_HZ)
    stage = stages(pattern=pattern)["coarse"]
    fine = stages(pattern=pattern)["fine"]
    items = load_items(tmp_path).items
    makers = {"wav2vec": ClickTokenizer(lost_frames), "codec": ClickCodec(), "audio_conditioner": None}
    source = WaveSource(items, stage, seconds=0.6, **makers)
    pairs = [(epoch, 0) for epoch in range(12)]
    read = source.read(source.batch(pairs))
    streams, lengths = unpacked(stage, read)
    starts = [source.crops.get(*pair).start_seconds for pair in pairs]
    assert len(set(starts)) > 6
    whole = torch.cat((streams["coarse"], unpacked(fine, read)[0]["fine"]), dim=-1)
    num_clicks = 0
    for item, start in enumerate(starts):
        right = CLICKS[(CLICKS >= start) & (CLICKS < start + 0.6)] - start
        assert close(acoustic_times(whole[item]), right, 1 / CODEC_HZ)
        token = semantic_times(streams["semantic"][item, : lengths["semantic"][item]].clamp(min=0)[:, 0])
        assert close(token, right[right < 0.6 - 0.04 * lost_frames], 0.0026)
        num_clicks += len(right)
    assert num_clicks > 30
    if pattern != "flat" and not lost_frames:
        assert check_rows(stage, stage.packed(read.tokens, read.ends)) == num_clicks


@every_pattern
def test_crops_of_token_records_have_the_same_clicks_in_every_stream(tmp_path, pattern):
    """Crops of precomputed tokens of different rates start at the same time."""
    tokenizer, codec = ClickTokenizer(lost_frames=1), ClickCodec()

    def make_record(index: int) -> dict[str, np.ndarray]:
        times = CLICKS + 0.02 * index
        return {
            "semantic": tokenizer(click_track(times, 2.0, TOKENIZER_HZ)[None])[0].numpy(),
            "acoustic": codec.tokenize(click_track(times, 2.0, CODEC_HZ)[None])[0].numpy(),
        }

    write_shards(tmp_path / "shards", make_record, 3, {})
    stage, fine = (stages(pattern=pattern)[name] for name in ("coarse", "fine"))
    source = ShardSource(TokenShards(tmp_path / "shards"), stage, seconds=0.6, audio_conditioner=None)
    pairs = [(epoch, index) for epoch in range(6) for index in range(3)]
    read = source.read(source.batch(pairs))
    streams, _ = unpacked(stage, read)
    whole = torch.cat((streams["coarse"], unpacked(fine, read)[0]["fine"]), dim=-1)
    starts = set()
    for item, (_, index) in enumerate(pairs):
        token, played = semantic_times(streams["semantic"][item, :, 0].clamp(min=0)), acoustic_times(whole[item])
        assert close(token, played, 0.0026) and len(played) >= 2
        # The distances identify the clicks. A crop keeps them, and starts at a whole semantic frame.
        fits = [n for n in range(len(CLICKS)) if close(CLICKS[n : n + len(played)].diff(), played.diff(), 0.001)]
        start = float(CLICKS[fits[0]] + 0.02 * index - played[0])
        assert len(fits) == 1 and abs(start / 0.04 - round(start / 0.04)) < 0.02
        starts.add(round(start / 0.04))
    assert len(starts) > 6
    if pattern != "flat":
        assert check_rows(stage, stage.packed(read.tokens, read.ends)) > 30


# windows


class Copying:
    """A stage that predicts clicks from the rows before, with one-hot embeddings and states in place of weights.

    It has no frame counts and no windows, so it predicts wrong tokens if a window does not start at a whole frame of
    every input stream.
    """

    def __init__(self, **options):
        super().__init__(**options)
        num_ids = self.layout.num_ids
        self.embedding = nn.Embedding.from_pretrained(torch.eye(num_ids + 1, num_ids), padding_idx=num_ids)
        self.transformer = nn.Module()
        self.transformer.stage = weakref.proxy(self)
        for layer, head in zip(self.heads, self.layout.heads):
            layer.weight = nn.Parameter(50.0 * self.embedding.weight[head.first_id :][: head.num_logits])

    def answers(self, rows: list[list[int]]) -> list[int]:
        """The token of each head in the row after rows with the given ids; any token before the start row."""
        starts = [row for row, ids in enumerate(rows) if 0 in ids]
        if not starts:
            return [0] * len(self.layout.heads)
        self.words, rows = [ids[0] for ids in rows[: starts[0]]], rows[starts[0] :]
        source, num_levels = self.layout.inputs[0], self.layout.predicted[0].num_levels
        last_id = source.vocab_size * source.num_levels
        # Ids of the input stream by row, in the order of the levels.
        inputs = [[(one - 1) % source.vocab_size for one in ids if 1 <= one <= last_id] for ids in rows]
        if self.layout.pattern == "flat":
            flat = [token for tokens in inputs for token in tokens]
            size = source.num_levels
            tokens = [flat[at : at + size] for at in range(0, len(flat) - size + 1, size)]
            frame, level = divmod(len(rows) - 1 - len(flat), num_levels)
            frames = [frame if level == number else -1 for number in range(num_levels)]
        else:
            later = 1 if self.layout.pattern == "delayed" else 0
            tokens = [row if row else [0] * source.num_levels for row in inputs]
            frames = [len(rows) - 1 - later * number for number in range(num_levels)]
        return [self.copied(tokens, frame)[level] if frame >= 0 else 0 for level, frame in enumerate(frames)]


class CopyingRows(CachedTransformer):
    """Has the methods of a `CachedTransformer`, and calls `Copying.answers` with all rows before."""

    is_current = True

    def __init__(self, transformer: nn.Module, batch: int) -> None:
        self.stage, self.batch = transformer.stage, batch
        self.hidden = torch.zeros(batch, self.stage.layout.num_ids)
        self.rows: list[list[list[int]]] = [[] for _ in range(batch)]  # ids by item and row

    def prefill(self, x: Tensor, conditions: object, counts: list[int], num_positions: int) -> Tensor:
        self.num_positions = num_positions
        self.rows = [[present_ids(row) for row in rows[:count]] for rows, count in zip(x, counts)]
        return self.states()

    def step(self, x: Tensor, rows: list[int]) -> Tensor:
        assert max(rows) < self.num_positions
        for item, row in enumerate(rows):
            assert row <= len(self.rows[item])
            self.rows[item][row:] = [present_ids(x[item])]
        return self.states()

    def states(self) -> Tensor:
        for state, rows in zip(self.hidden, self.rows):
            ids = [head.first_id + token for head, token in zip(self.stage.layout.heads, self.stage.answers(rows))]
            state.copy_(self.stage.embedding.weight[ids].sum(dim=0))
        return self.hidden

    def release(self) -> None:
        self.rows = []


def present_ids(row: Tensor) -> list[int]:
    """Ids of a row, from the sum of their one-hot embeddings."""
    return row.nonzero().flatten().tolist()


@pytest.fixture(autouse=True)
def copying_rows(monkeypatch):
    """Stages of this file decode without weights."""
    monkeypatch.setattr(decode_session, "CachedTransformer", CopyingRows)


class CopyingSemantic(Copying, SemanticTransformer):
    """Repeats the clicks of one period before."""

    period = 7

    def answers(self, rows: list[list[int]]) -> list[int]:
        tokens = [ids[0] - 1 for ids in rows[1:]]
        return [tokens[-self.period] if len(tokens) >= self.period else 0]


class CopyingCoarse(Copying, CoarseTransformer):
    """Puts a click into the quarter of the frame that the semantic token names."""

    def copied(self, tokens: list[list[int]], frame: int) -> list[int]:
        row = frame // 2 if self.layout.pattern == "flat" else frame
        token = tokens[row][0] if row < len(tokens) else 0
        half, quarter = divmod(token - 1, 4)
        return [1 + quarter, 2] if token and half == frame % 2 else [0, 0]


class CopyingFine(Copying, FineTransformer):
    """Completes the coarse levels with a fixed digit and the checksum."""

    def copied(self, tokens: list[list[int]], frame: int) -> list[int]:
        quarter, digit = tokens[frame] if frame < len(tokens) else (0, 0)
        return [2, (quarter + digit + 2) % 8] if quarter else [0, 0]


class WordCoarse(CopyingCoarse):
    """Has an input stream of three words, and puts clicks into the eighth of the frame that their sum names."""

    def copied(self, tokens: list[list[int]], frame: int) -> list[int]:
        quarter, digit = super().copied(tokens, frame)
        first_id = self.layout.num_ids - 1 - WORDS.vocab_size  # the null token has the last id
        return [quarter, digit and sum(word - first_id for word in self.words) % 4]


WORDS = Stream("words", 30, 1, None, is_input=True)
# Two clicks in a period of 280 ms. They have changing positions in the frames of both tokens.
BEAT, SECOND_BEAT, PERIOD = 0.031, 0.171, 0.28


def beats(seconds: float) -> Tensor:
    times = torch.arange(20) * PERIOD
    both = torch.stack((times + BEAT, times + SECOND_BEAT), dim=1).flatten()
    return both[both < seconds]


def tokens_of(times: Tensor, seconds: float) -> tuple[Tensor, Tensor]:
    """Semantic tokens `[1, t, 1]` and acoustic tokens `[1, f, 4]` of a click track."""
    semantic = ClickTokenizer()(click_track(times, seconds, TOKENIZER_HZ)[None])[..., None]
    return semantic, ClickCodec().tokenize(click_track(times, seconds, CODEC_HZ)[None])


@pytest.mark.slow
def test_the_semantic_stage_keeps_the_beat_across_windows():
    """75 tokens in windows of even and odd sizes, with prompts of 8 and 10 tokens: all clicks are on the beat."""
    right, _ = tokens_of(beats(3.0), 3.0)
    for window in (16, 17, 21, None):
        result = decode_in_windows(
            stages()["semantic"],
            {"semantic": right[:, :10].repeat(2, 1, 1)},
            torch.tensor([75, 61]),
            lengths={"semantic": torch.tensor([10, 8])},
            window_frames=window,
            settings=GREEDY,
        )
        for tokens, count in zip(result.streams["semantic"], result.lengths["semantic"].tolist()):
            assert torch.equal(tokens[:count], right[0, :count])


@pytest.mark.slow
@every_pattern
@pytest.mark.parametrize("window", [10, 11, 24, None])
def test_the_coarse_stage_follows_semantic_tokens_across_windows(pattern, window):
    """Irregular clicks, windows of even and odd sizes, and prompts of different lengths."""
    semantic, codes = tokens_of(CLICKS, 2.0)
    result = decode_in_windows(
        stages(pattern=pattern)["coarse"],
        {"semantic": semantic.repeat(2, 1, 1), "coarse": codes[..., :2].repeat(2, 1, 1)[:, :33]},
        torch.tensor([100, 77]),
        lengths={"coarse": torch.tensor([0, 33])},
        window_frames=window,
        settings=GREEDY,
    )
    for item, known in enumerate([0, 33]):
        count = int(result.lengths["coarse"][item])
        tokens = result.streams["coarse"][item, :count]
        assert torch.equal(tokens[:known], codes[0, :known, :2])
        assert torch.equal(tokens[known:, 0], codes[0, known:count, 0])
        assert torch.equal(tokens[known:, 1], 2 * (codes[0, known:count, 0] > 0))


@pytest.mark.slow
@every_pattern
def test_streams_without_a_rate_are_whole_in_every_window(pattern):
    """Every window has all words of its item; an item can have no words."""
    semantic, codes = tokens_of(CLICKS, 2.0)
    sizes = {"num_semantic_tokens": 9, "codebook_size": 8, "num_coarse_quantizers": 2, **SIZES}
    stage = WordCoarse(pattern=pattern, extra_streams=[WORDS], **sizes)
    words, num_words = torch.tensor([[7, 20, 4], [9, 1, 0], [0, 0, 0]]), torch.tensor([3, 2, 0])
    result = decode_in_windows(
        stage,
        {"semantic": semantic.repeat(3, 1, 1), "words": words[..., None]},
        100,
        lengths={"words": num_words},
        window_frames=10,
        settings=GREEDY,
    ).streams["coarse"]
    null_word = WORDS.vocab_size  # its id follows the ids of the words
    for item, reports in enumerate([31 % 4, 10 % 4, null_word % 4]):
        assert torch.equal(result[item, :, 0], codes[0, :, 0])
        assert torch.equal(result[item, :, 1], reports * (codes[0, :, 0] > 0))


@pytest.mark.slow
@every_pattern
@pytest.mark.parametrize("window", [6, 9, None])
def test_the_fine_stage_completes_its_own_frame_across_windows(pattern, window):
    """The checksum of every frame agrees with its coarse levels on both sides of window borders."""
    _, codes = tokens_of(CLICKS, 2.0)
    counts = torch.tensor([100, 41])
    result = decode_in_windows(
        stages(pattern=pattern)["fine"],
        {"coarse": codes[..., :2].repeat(2, 1, 1), "fine": codes[..., 2:].repeat(2, 1, 1)[:, :20]},
        counts,
        lengths={"coarse": counts, "fine": torch.tensor([20, 5])},
        window_frames=window,
        settings=GREEDY,
    )
    for item, count in enumerate(counts.tolist()):
        whole = torch.cat((codes[0, :count, :2], result.streams["fine"][item, :count]), dim=-1)
        assert close(acoustic_times(whole), CLICKS[CLICKS < count * 0.02], 4 / CODEC_HZ)


@pytest.mark.slow
@every_pattern
def test_a_continuation_keeps_the_beat_through_all_stages(pattern):
    """An AudioLM continues a prompt for 3 s with a different window length per stage: all clicks are on the beat."""
    parts = stages(pattern=pattern)
    for name, seconds in {"semantic": 0.64, "coarse": 0.44, "fine": 0.22}.items():
        parts[name].max_seconds = seconds
    audio_lm = AudioLM(
        wav2vec=ClickTokenizer(),
        codec=ClickCodec(),
        sampling=dict.fromkeys(parts, GREEDY),
        **{f"{name}_transformer": stage for name, stage in parts.items()},
    )
    for prime_hz, prime_seconds in ((CODEC_HZ, 0.6), (FILE_HZ, 0.37)):
        prompt = click_track(beats(prime_seconds), prime_seconds, prime_hz)
        wave = audio_lm.generate(
            GenerationRequest(prime_wave=prompt[None].repeat(2, 1), prime_wave_input_sample_hz=prime_hz, seconds=3.0)
        ).wave
        assert wave.shape == (2, 3 * CODEC_HZ) and (wave >= 0).all()
        for item in wave:
            assert close(item.nonzero().flatten() / CODEC_HZ, beats(3.0), 0.0036)
