"""Captions: every label value has words, what is said is true, and held-out wordings stay held out."""

from random import Random

import pytest

from musiclm_pytorch.recipes.corpus.captions import FULL_FRACTION, caption_variants
from musiclm_pytorch.recipes.corpus.corpus import plan_clip
from musiclm_pytorch.recipes.corpus.dances import DANCES
from musiclm_pytorch.recipes.corpus.performance import CHORDS, INSTRUMENTS, REGISTERS, TEMPI_BPM
from musiclm_pytorch.recipes.corpus.wordings import HELD_OUT, TRAINING, Wordings

LABELS = {
    "instrument": "flute",
    "tempo": "fast",
    "dance": "jig",
    "mode": "minor",
    "chords": "string chords",
    "drums": True,
    "register": "high",
}


@pytest.mark.parametrize("words", [TRAINING, HELD_OUT])
def test_wordings_cover_every_label_value(words: Wordings) -> None:
    """A label value without a word would raise in the middle of a corpus run."""
    assert set(words.instrument) == set(INSTRUMENTS)
    assert set(words.tempo) == set(words.pace) == set(TEMPI_BPM)
    assert set(words.dance) == set(DANCES)
    assert set(words.mode) == set(words.key) == {"major", "minor"}
    assert set(words.chords) == set(CHORDS)
    assert set(words.register) == set(REGISTERS)


def test_held_out_wordings_are_never_used_in_training() -> None:
    """A held-out phrase or template that training also uses would make the held-out score a training score."""
    for slot in ("tempo", "pace", "chords"):
        for value, phrases in getattr(HELD_OUT, slot).items():
            assert not set(phrases) & set(getattr(TRAINING, slot)[value])
    assert not set(HELD_OUT.full + HELD_OUT.partial) & set(TRAINING.full + TRAINING.partial)
    assert not set(HELD_OUT.drums) & set(TRAINING.drums)
    assert not set(HELD_OUT.solo) & set(TRAINING.solo)


def test_held_out_phrases_recombine_training_words() -> None:
    """Held-out tempo phrases have only words of training phrases; otherwise they would test unknown words."""

    def words(wordings: Wordings) -> set[str]:
        phrases = [
            phrase for slot in (wordings.tempo, wordings.pace) for several in slot.values() for phrase in several
        ]
        return {word for phrase in phrases for word in phrase.replace("-", " ").split()}

    assert words(HELD_OUT) - words(TRAINING) <= {"and", "in", "moderately"}


def test_caption_variants_are_distinct_deterministic_and_well_formed() -> None:
    """No caption is repeated, has an unfilled slot or a wrong article."""
    for held_out in (False, True):
        captions = caption_variants(LABELS, Random(3), 30, held_out=held_out)
        assert captions == caption_variants(LABELS, Random(3), 30, held_out=held_out)
        assert len(set(captions)) == 30
        for caption in captions:
            assert not set("{}()") & set(caption)
            assert caption == caption.strip() and "  " not in caption
    accordion = caption_variants(LABELS | {"instrument": "accordion"}, Random(0), 60)
    assert any("an accordion" in caption for caption in accordion)
    assert not any("a accordion" in caption for caption in accordion)


def test_only_solos_are_called_solo() -> None:
    """The captions of accompanied clips do not contain the word."""
    solo = ("solo", "alone", "unaccompanied", "by itself", "no accompaniment", "no other")
    for held_out in (False, True):
        accompanied = caption_variants(LABELS, Random(1), 80, held_out=held_out)
        assert not any(word in caption for word in solo for caption in accompanied)
        alone = caption_variants(LABELS | {"chords": None, "drums": False}, Random(1), 80, held_out=held_out)
        assert any(word in caption for word in solo for caption in alone)
        assert not any("chords" in caption or "drum" in caption for caption in alone)


def test_captions_never_contradict_the_tempo() -> None:
    """No caption has a word for another tempo, except for "neither fast nor slow"."""
    slow = caption_variants(LABELS | {"tempo": "slow"}, Random(5), 100)
    fast = caption_variants(LABELS, Random(5), 100)
    assert not any(word in caption for word in ("fast", "quick", "brisk", "lively", "medium") for caption in slow)
    assert not any(word in caption for word in ("slow", "calm", "gentle", "medium", "moderate") for caption in fast)


def test_partial_labels_give_partial_captions() -> None:
    """Labels of instruments alone are enough, and no other attribute is mentioned."""
    captions = caption_variants({"instrument": "piano"}, Random(0), 5)
    assert len(captions) == 5
    assert all("piano" in caption for caption in captions)
    assert not any(
        word in caption for word in ("fast", "slow", "major", "minor", "jig", "solo") for caption in captions
    )


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [({"instrument": "kazoo"}, 1, "kazoo"), (LABELS, 0, "count"), ({"dance": "jig"}, 1, "no caption template exists")],
)
def test_captions_of_unknown_values_are_an_error(labels: dict, count: int, message: str) -> None:
    """The message names the unknown value."""
    with pytest.raises(ValueError, match=message):
        caption_variants(labels, Random(0), count)


@pytest.mark.slow
def test_most_captions_name_the_instrument_and_most_attributes() -> None:
    """Shares over 200 clips, with a tolerance of 6 standard errors."""
    rows = [plan_clip("train", index, seed=7).row for index in range(200)]
    captions = [caption for row in rows for caption in row["captions"]]
    named = sum(
        any(word in caption for word in TRAINING.instrument[row["instrument"]])
        for row in rows
        for caption in row["captions"]
    )
    long = sum(len(caption.split()) >= 6 for caption in captions)
    assert named / len(captions) > 0.93
    assert long / len(captions) > FULL_FRACTION - 0.1
