"""What a clip is called: every form that captions and aspects have, and what of them an epoch shows."""

import re
from collections import Counter
from pathlib import Path

import pytest

from audiolm_pytorch.data.manifest import AudioItem, captions_of
from musiclm_pytorch.mulan.captions import CaptionSampler, aspects_of, parse_aspects, texts_of

LONG = "A slow song, with piano, and drums. It is sad; mellow, like rain... Played at 4.5 or 1,000 beats"
PARTS = ("A slow song", "with piano", "and drums", "It is sad", "mellow", "like rain", "Played at 4.5 or 1,000 beats")


def clip(caption=None, **labels):
    return AudioItem(Path("songs/a.wav"), caption, labels, 16_000, 16_000)


@pytest.mark.parametrize(
    ("captions", "all_of_them"),
    [
        (None, ["a"]),
        ("b", ["a", "b"]),
        (["b", "a", " ", None, 7, "c", "b"], ["a", "b", "c"]),
        ({"short": "b", "long": ["c", "d"], "none": None}, ["a", "b", "c", "d"]),
        (7, ["a"]),
    ],
)
def test_captions_in_every_form(captions, all_of_them):
    """A text, a list or texts by name are captions behind the first one; each counts once, and only texts count."""
    assert captions_of(clip("a", captions=captions)) == all_of_them
    without = [text for text in all_of_them if text != "a" or (isinstance(captions, list) and "a" in captions)]
    assert set(captions_of(clip(captions=captions))) == set(without)


@pytest.mark.parametrize(
    ("text", "aspects"),
    [
        ("['low quality', \"children's song\", 'punchy \"4 on the floor\" kick']", None),
        ("['low quality', \"children's song\", 'punchy \\\"4 on the floor\\\" kick']", None),
        ('["low quality", "children\'s song", "punchy \\"4 on the floor\\" kick"]', None),
        ('low quality, children\'s song,,punchy "4 on the floor" kick,', None),
        ("[]", []),
        (" ", []),
        ("['a', 'b, c',]", ["a", "b, c"]),
        (r"['\u00e9', 'AC\DC']", ["é", "AC\\DC"]),
        (r'["\ud83c\udfb5"]', ["🎵"]),
    ],
)
def test_aspect_lists_as_tables_hold_them(text, aspects):
    """Lists in Python, in JSON and with commas are parsed alike, with quotes and commas inside of aspects."""
    expected = ["low quality", "children's song", 'punchy "4 on the floor" kick'] if aspects is None else aspects
    assert parse_aspects(text) == expected
    assert aspects_of(clip(aspect_list=text)) == aspects_of(clip(aspects=expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[" * 60_000,
        "[" * 100_000,
        "['a'" + ", 'a'" * 20_000 + "]",
        "['a', ['b']]",
        "[1, 'b']",
        "['a' + 'b']",
        "['a' 'b']",
        "[__import__('os').system('true')]",
        "['a'",
        r"['\xzz']",
        r'["\ud83c"]',
        "[None]",
    ],
)
def test_hostile_aspect_lists_are_refused(text):
    """No code is executed, nested or very long lists are cheap, and the message names the clip."""
    with pytest.raises(ValueError, match="need a list of texts|the limit is 65536"):
        parse_aspects(text)
    with pytest.raises(ValueError, match="songs/a.wav: label 'aspects': "):
        aspects_of(clip(aspects=text))


def test_texts_of_a_clip_fall_back_on_its_aspects():
    """Clips without captions still have a text for retrieval and tokenizers; clips with nothing have none."""
    assert texts_of(clip("a", captions=["b"], aspects=["c"])) == ["a", "b"]
    assert texts_of(clip(aspects=["c", "d"], aspect_list="['d', 'e']")) == ["c, d, e"]
    assert texts_of(clip(mood="calm")) == []


def test_with_the_defaults_captions_alternate():
    """A single caption is used in every epoch; several captions alternate, beginning with the first."""
    sampler = CaptionSampler()
    assert [sampler.sample(clip(LONG), epoch, 3) for epoch in range(3)] == [[LONG]] * 3
    three = clip("a", captions=["b", "c"])
    assert [sampler.sample(three, epoch, 0) for epoch in (0, 1, 2, 3, 1)] == [["a"], ["b"], ["c"], ["a"], ["b"]]
    assert sampler.sample(clip(), 0, 0) == []


def test_several_captions_a_clip_are_all_seen_equally():
    """Two of three captions an epoch: never the same one twice at once, and each twice in three epochs."""
    three = clip("a", captions=["b", "c"])
    drawn = [CaptionSampler(captions_per_clip=2).sample(three, epoch, 0) for epoch in range(3)]
    assert drawn == [["a", "b"], ["c", "a"], ["b", "c"]]
    for epoch in range(4):
        assert set(CaptionSampler(captions_per_clip=5).sample(three, epoch, 0)) == {"a", "b", "c"}


def test_samples_depend_on_seed_epoch_and_index_alone():
    """Seed, epoch and index alone determine the texts; earlier draws do not matter."""
    song = clip(LONG, captions=[LONG.replace("piano", "harp")], aspects=list("abcdefghij"))

    def texts(seed, epochs, index):
        sampler = CaptionSampler(captions_per_clip=2, caption_dropout=0.5, seed=seed)
        return {epoch: sampler.sample(song, epoch, index) for epoch in epochs}

    first = texts(0, range(20), 5)
    assert texts(0, reversed(range(20)), 5) == first
    for other in (texts(1, range(20), 5), texts(0, range(20), 6)):
        assert sum(other[epoch] == first[epoch] for epoch in first) < 5
    assert len({tuple(drawn) for drawn in first.values()}) > 15


@pytest.mark.parametrize("aspect_prob", [0.0, 0.3, 1.0])
def test_aspects_come_with_their_probability(aspect_prob):
    """Oracle: of 2,000 draws that share is a list of aspects, in 5 standard errors; 0 and 1 mean never and always."""
    sampler = CaptionSampler(aspect_prob=aspect_prob)
    drawn = [sampler.sample(clip("caption", aspects=["x", "y"]), epoch, 0) for epoch in range(2000)]
    share = sum(texts != ["caption"] for texts in drawn) / len(drawn)
    assert abs(share - aspect_prob) <= 5 * (aspect_prob * (1 - aspect_prob) / len(drawn)) ** 0.5
    # without a caption, aspects are the only texts
    assert all(sampler.sample(clip(aspects=["x"]), epoch, 0) == ["x"] for epoch in range(5))


def test_aspect_lists_are_subsets_of_every_size_in_every_order():
    """All 15 ordered subsets of three aspects come up, sizes about equally often, and no aspect twice."""
    song = clip(aspect_list="['x', 'y', 'z', 'x']")
    drawn = Counter(CaptionSampler().sample(song, epoch, 1)[0] for epoch in range(1500))
    assert len(drawn) == 15
    sizes = Counter()
    for text, count in drawn.items():
        parts = text.split(", ")
        assert len(set(parts)) == len(parts) and set(parts) <= set("xyz")
        sizes[len(parts)] += count
    assert all(abs(sizes[size] - 500) < 100 for size in (1, 2, 3))


def test_aspects_follow_after_the_last_caption():
    """If there are more texts per clip than captions, aspects follow, unless `aspect_prob` is 0."""
    song = clip("caption", aspects=list("abcdefgh"))
    wanted, unwanted = CaptionSampler(captions_per_clip=3), CaptionSampler(captions_per_clip=3, aspect_prob=0.0)
    for epoch in range(30):
        texts = wanted.sample(song, epoch, 0)
        assert 2 <= len(set(texts)) == len(texts) and all(
            set(text) <= set("abcdefgh, ") for text in {*texts} - {"caption"}
        )
        assert unwanted.sample(song, epoch, 0) == ["caption"]


def test_dropout_leaves_whole_parts_in_their_order():
    """Every part stays at its rate, at least one does, the order is kept and numbers stay whole."""
    sampler = CaptionSampler(caption_dropout=0.4)
    seen = Counter()
    for epoch in range(1000):
        (text,) = sampler.sample(clip(LONG), epoch, 0)
        stayed = [part for part in re.split(r"[,;.]+(?:\s+|$)", text) if part]
        assert stayed and stayed == [part for part in PARTS if part in stayed]
        assert not text.endswith((",", ";"))
        seen.update(stayed)
    assert all(abs(seen[part] - 600) < 80 for part in PARTS)
    always = {CaptionSampler(caption_dropout=1.0).sample(clip(LONG), epoch, 0)[0].rstrip(",;.") for epoch in range(100)}
    assert always == set(PARTS)


def test_sentences_end_where_their_last_parts_are_left_out():
    """Oracle by hand: a part takes over the end of its sentence, and one caption of one part stays as it is."""
    sampler = CaptionSampler(caption_dropout=0.5)
    drawn = {sampler.sample(clip("A, b, c. D"), epoch, 0)[0] for epoch in range(300)}
    assert drawn == {
        *("A.", "b.", "c.", "D", "A, b.", "A, c.", "b, c.", "A, b, c."),
        *("A. D", "b. D", "c. D", "A, b. D", "A, c. D", "b, c. D", "A, b, c. D"),
    }
    assert {sampler.sample(clip(" one part. "), epoch, 0)[0] for epoch in range(20)} == {" one part. "}


@pytest.mark.parametrize(
    "numbers", [{"captions_per_clip": 0}, {"aspect_prob": 1.5}, {"caption_dropout": -0.1}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(numbers):
    """The constructor checks each number, and `sample` checks epoch and index."""
    name = next(iter(numbers))
    with pytest.raises(ValueError, match=f"need .*{name}|{name} must be in 0..1"):
        CaptionSampler(**numbers)
    with pytest.raises(ValueError, match="non-negative"):
        CaptionSampler().sample(clip("a"), -1, 0)
