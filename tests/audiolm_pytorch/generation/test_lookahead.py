"""A coarse stage with look-ahead: the tokens that it reads in training, windows and streams, and at the end."""

import pytest
import torch

from audiolm_pytorch.generation import decode_session
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.stages import CoarseTransformer
from audiolm_pytorch.lm.training_data import ShardSource
from audiolm_pytorch.saving.modules import load_module, save_module
from tests.audiolm_pytorch.generation.test_alignment import CLICKS, CopyingCoarse, CopyingRows, tokens_of
from tests.audiolm_pytorch.generation.test_audiolm_stream import WINDOWS, check_stream
from tests.audiolm_pytorch.lm.test_trainers import make_shards
from tests.helpers.decoding import decode, decode_in_windows
from tests.helpers.fakes import SIZES, tiny_stages
from tests.helpers.toy_audiolm import audiolm_of, streaming_codec

GREEDY = SamplingSettings(temperature=0)
LOOKAHEAD_SECONDS, LOOKAHEAD_TOKENS = 0.12, 3
both_patterns = pytest.mark.parametrize("pattern", ["delayed", "parallel"])


def coarse_stage(pattern: str = "delayed", **changes) -> CoarseTransformer:
    """A coarse stage that reads three semantic tokens ahead, with distinct logits."""
    torch.manual_seed(0)
    stage = tiny_stages(LOOKAHEAD_SECONDS, **changes)["coarse"]
    stage = CoarseTransformer(**{**stage.config, "pattern": pattern}).eval()
    for weight in stage.heads.parameters():
        weight.data.mul_(40)
    return stage


@both_patterns
def test_a_frame_depends_on_tokens_up_to_its_lookahead(pattern):
    """Another semantic token changes the predictions from the row on that reads it, and none before."""
    stage = coarse_stage(pattern)
    tokens = {"semantic": torch.randint(0, 12, (1, 15, 1)), "coarse": torch.randint(0, 16, (1, 30, 2))}
    packed = stage.layout.pack(tokens)
    states = stage.hidden(packed.ids, packed.input_mask)
    for changed in range(15):
        semantic = tokens["semantic"].clone()
        semantic[0, changed] = (semantic[0, changed] + 1) % 12
        other = stage.layout.pack({**tokens, "semantic": semantic})
        differs = (stage.hidden(other.ids, other.input_mask) - states).abs().amax(dim=-1)[0] > 1e-6
        first = max(0, 2 * (changed - LOOKAHEAD_TOKENS))
        assert not differs[:first].any() and differs[first]


@both_patterns
def test_decoding_reads_the_rows_of_training(pattern):
    """Cached greedy decoding equals one pass over the packed result, at the end of the semantic tokens too."""
    stage = coarse_stage(pattern)
    semantic = torch.randint(0, 12, (2, 10, 1))
    lengths = {"semantic": torch.tensor([10, 7])}
    counts = torch.tensor([16, 14])  # the first item has tokens after its last frame
    result = decode(stage, {"semantic": semantic}, {"coarse": counts}, lengths=lengths, settings=GREEDY).streams
    packed = stage.layout.pack({"semantic": semantic, **result}, {**lengths, "coarse": counts})
    states = stage.hidden(packed.ids, packed.input_mask)
    for item, row, column in packed.loss_mask.nonzero().tolist():
        token = int(packed.ids[item, row, column])
        head = next(number for number, head in enumerate(stage.layout.heads) if token in head.ids(allow_eos=False))
        assert token == stage.layout.heads[head].first_id + int(stage.logits(states[item, row - 1], head).argmax())


@both_patterns
def test_windows_receive_their_lookahead(pattern):
    """Three windows written out; the last window has only the tokens that exist."""
    stage = coarse_stage(pattern)
    semantic, prompt = torch.randint(0, 12, (1, 9, 1)), torch.randint(0, 16, (1, 3, 2))
    streams = {"semantic": semantic, "coarse": prompt}
    result = decode_in_windows(stage, streams, 14, window_frames=8, settings=GREEDY).streams["coarse"]

    def window(first: int, stop: int, known: torch.Tensor, num_frames: int) -> torch.Tensor:
        inputs = {"semantic": semantic[:, first:stop], "coarse": known}
        return decode(stage, inputs, {"coarse": num_frames}, settings=GREEDY).streams["coarse"]

    one = window(0, 4 + LOOKAHEAD_TOKENS, prompt, 8)
    two = window(2, 6 + LOOKAHEAD_TOKENS, one[:, 4:], 8)
    three = window(4, 9, two[:, 4:], 6)
    assert torch.equal(result, torch.cat((one, two[:, 4:], three[:, 4:]), dim=1))


class AheadCoarse(CopyingCoarse):
    """Reads the semantic token of a frame from the look-ahead column of an earlier row, if there is one."""

    def answers(self, rows):
        starts = [number for number, ids in enumerate(rows) if 0 in ids]
        if not starts:
            return [0, 0]
        last = len(rows) - 1 - starts[0]
        delay = 1 if self.layout.pattern == "delayed" else 0
        return [self.click(rows, last)[0], self.click(rows, last - delay)[1]]

    def click(self, rows, frame):
        if frame < 0:
            return [0, 0]
        row = max(0, frame - 2 * LOOKAHEAD_TOKENS)
        first_id = 1 + 9 * (frame // 2 - row // 2)
        tokens = [[one - first_id] for one in rows[row] if first_id <= one < first_id + 9] or [[0]]
        return self.copied(tokens * (frame + 1), frame)


@pytest.mark.parametrize("window", [10, 24, None])
@both_patterns
def test_clicks_are_read_from_the_lookahead(pattern, window, monkeypatch):
    """Click tracks through a stage that reads only look-ahead tokens: every click is in its frame, in every window."""
    monkeypatch.setattr(decode_session, "CachedTransformer", CopyingRows)
    semantic, codes = tokens_of(CLICKS, 2.0)
    sizes = {"num_semantic_tokens": 9, "codebook_size": 8, "num_coarse_quantizers": 2, **SIZES}
    stage = AheadCoarse(pattern=pattern, semantic_lookahead_seconds=LOOKAHEAD_SECONDS, **sizes)
    result = decode_in_windows(stage, {"semantic": semantic}, 100, window_frames=window, settings=GREEDY)
    assert torch.equal(result.streams["coarse"][0, :, 0], codes[0, :, 0])
    assert torch.equal(result.streams["coarse"][0, :, 1], 2 * (codes[0, :, 0] > 0))


def test_a_stream_waits_for_the_lookahead():
    """The first chunk needs three semantic tokens more than its window, and the stream equals `generate`."""
    audio_lm = audiolm_of(codec=streaming_codec(), lookahead_seconds=LOOKAHEAD_SECONDS, **WINDOWS)
    chunks = check_stream(audio_lm, 0.1, seconds=1.0, seeds=0)
    assert chunks[0].semantic.shape == (1, 8 + LOOKAHEAD_TOKENS)


@pytest.mark.slow
def test_streams_with_lookahead_equal_generate():
    """Batches with prompts, texts and items that end by themselves."""
    for ends in (False, True):
        audio_lm = audiolm_of(True, codec=streaming_codec(), ends=ends, lookahead_seconds=LOOKAHEAD_SECONDS, **WINDOWS)
        for seed in range(3):
            request = {"text": ["one", "seventy"], "seeds": seed, "prime_wave": [torch.rand(300), torch.rand(90)]}
            check_stream(audio_lm, 0.1, **request, **({} if ends else {"seconds": 0.9}))


def test_crops_of_shards_contain_the_lookahead(tmp_path):
    """A crop has the tokens after its end; at the end of the record they do not exist."""
    stage, shards = coarse_stage(), make_shards(tmp_path)
    source = ShardSource(shards, stage, seconds=0.4, audio_conditioner=None)
    batch = source.batch([(epoch, 0) for epoch in range(100)])
    counts = set()
    for item in range(100):
        num_tokens = int(batch.lengths["semantic"][item])
        semantic, acoustic = batch.tokens["semantic"][item, :num_tokens], batch.tokens["acoustic"][item, :, 0]
        start = next(s for s in range(0, 81, 2) if s % 16 == acoustic[0] and s // 2 % 12 == semantic[0])
        starts = [s for s in range(start, 81, 48)]  # the tokens of the record repeat
        assert int(batch.lengths["acoustic"][item]) == 20
        assert any(num_tokens == min(10 + LOOKAHEAD_TOKENS, 50 - s // 2) for s in starts)
        assert torch.equal(semantic, torch.arange(start // 2, start // 2 + num_tokens) % 12)
        counts.add(num_tokens)
    assert counts == {10, 11, 12, 13}
    fine = ShardSource(shards, tiny_stages()["fine"], seconds=0.4, audio_conditioner=None)
    assert set(fine.batch([(0, 0)]).lengths["acoustic"].tolist()) == {20}


def test_a_stage_with_lookahead_is_saved(tmp_path):
    """The argument is in the config; without look-ahead the config is as before."""
    stage = coarse_stage()
    save_module(stage, tmp_path / "stage")
    loaded = load_module(tmp_path / "stage")
    assert loaded.config == stage.config and loaded.layout.streams[0].lookahead_frames == LOOKAHEAD_TOKENS
    assert "semantic_lookahead_seconds" not in tiny_stages()["coarse"].config
    with pytest.raises(ValueError, match="in the flat pattern"):
        coarse_stage("flat")
