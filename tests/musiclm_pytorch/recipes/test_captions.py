"""Captions: every label value has words, what is said is true, and held-out wordings stay held out."""

import re
from random import Random

import pytest

from musiclm_pytorch.recipes.corpus import vocabulary
from musiclm_pytorch.recipes.corpus.captions import FULL_FRACTION, caption_variants, hard_negatives
from musiclm_pytorch.recipes.corpus.dances import DANCES
from musiclm_pytorch.recipes.corpus.effects import EFFECTS
from musiclm_pytorch.recipes.corpus.instruments import BASSES, CHORDS, INSTRUMENTS, REGISTERS
from musiclm_pytorch.recipes.corpus.moods import MOODS
from musiclm_pytorch.recipes.corpus.performance import TEMPI_BPM
from musiclm_pytorch.recipes.corpus.planning import plan_clip
from musiclm_pytorch.recipes.corpus.repertoire import STYLES
from musiclm_pytorch.recipes.corpus.sentences import CLAUSES, HELD_OUT_SENTENCES, OPENINGS, SHORT
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
    assert set(vocabulary.GENRES) == set(vocabulary.USES) == {"folk dance", *STYLES}
    assert set(vocabulary.SONGS) == set(STYLES)
    assert set(vocabulary.MOODS) == set(MOODS)
    assert set(vocabulary.CHORD_PLAYERS) == set(CHORDS)
    assert set(vocabulary.BASS_PLAYERS) == set(BASSES)
    assert set(vocabulary.EFFECTS) == set(EFFECTS)


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
    assert named / len(captions) > 0.75
    assert long / len(captions) > FULL_FRACTION - 0.1


def _false_words(row: dict) -> list[str]:
    """Words that a caption of a clip must not contain, because they describe another value of a label."""
    moods = {word for name, words in vocabulary.MOODS.items() if name != row["mood"] for word in words}
    moods -= set(vocabulary.MOODS.get(row["mood"], ()))
    # The wordings of tempo and mode also have these words.
    moods -= {"calm", "gentle", "energetic", "bright", "cheerful", "sad", "melancholic", "dark", "happy", "upbeat"}
    # These words also describe styles, uses, effects and accompaniments.
    moods -= {
        "soft",
        "romantic",
        "beautiful",
        "funky",
        "mellow",
        "groovy",
        "dramatic",
        "strange",
        "sad",
        "warm",
        "grand",
    }
    false = sorted(moods)
    false += [
        name
        for name in (
            "bagpipes",
            "banjo",
            "cello",
            "flute",
            "harpsichord",
            "marimba",
            "oboe",
            "piano",
            "sitar",
            "trumpet",
            "violin",
            "accordion",
            "harp",
            "choir",
            "organ",
        )
        if name not in _players(row)
    ]
    tempi = {"slow": ("slow tempo", "slowly"), "medium tempo": ("medium tempo", "mid-tempo"), "fast": ("fast", "quick")}
    false += [word for tempo, words in tempi.items() if tempo != row["tempo"] for word in words]
    if not row["drums"]:
        false += ["with drums", "drum beat", "and drums", "drumming", "hi hats", "kick and snare"]
    if row["bass"] is None and row["instrument"] != "bass guitar":
        false += ["bass", "bassline"]
    if row["style"] != "folk dance":
        false += ["jig", "reel", "hornpipe", "folk"]
    false += [
        word
        for style, word in (
            ("techno", "techno"),
            ("jazz", "swing jazz"),
            ("reggae", "reggae"),
            ("funk", "funk"),
            ("blues", "blues song"),
            ("chorale", "hymn"),
            ("march", "marching"),
        )
        if row["style"] != style
    ]
    if row["register"] != "low":
        false += (
            ["low register", "low-pitched", "low notes"] if row["bass"] is None else ["low register", "low-pitched"]
        )
    if row["register"] != "high":
        false += ["high register", "high-pitched", "high notes", "high pitched"]
    if row["effect"] != "reverb":
        false += ["reverb", "reverberant", "echoing"]
    if row["effect"] != "low quality":
        false += ["low quality", "noisy", "poor"]
    return false + [other for other in ("major", "minor") if other != row["mode"]]


def _players(row: dict) -> str:
    """All names of the instruments of a clip."""
    names = [*TRAINING.instrument[row["instrument"]], row["instrument"]]
    for label in ("chords", "pad"):
        if row[label] is not None:
            names += [row[label], *TRAINING.chords[row[label]], *vocabulary.CHORD_PLAYERS[row[label]]]
    return " ".join(names)


@pytest.mark.slow
def test_captions_of_the_corpus_are_true() -> None:
    """No caption has a word for another instrument, tempo, mood, style, mode, register or effect than the clip's."""
    for split, count in (("train", 300), ("valid", 100)):
        for index in range(count):
            row = plan_clip(split, index, seed=11).row
            for caption in row["captions"]:
                words = f" {caption} ".replace(",", " ").replace(".", " ").replace(":", " ")
                words = words.replace("neither fast nor slow", "").replace("moderately fast", "")
                found = [
                    word for word in _false_words(row) if f" {word} " in words.replace("neither fast nor slow", "")
                ]
                assert not found, (found, caption, row)


@pytest.mark.slow
def test_every_template_is_used() -> None:
    """A template whose conditions contradict each other would never occur in a caption."""
    shown = " / ".join(caption for index in range(400) for caption in plan_clip("train", index, seed=2).row["captions"])
    shown += " / ".join(
        caption for index in range(200) for caption in plan_clip("valid", index, seed=2).row["captions"]
    )
    templates = [*SHORT, *OPENINGS, *HELD_OUT_SENTENCES, *(text for texts in CLAUSES.values() for text in texts)]
    pieces = {max(re.split(r"{\w+}|a\(n\)", template), key=len).strip() for template in templates}
    missing = [piece for piece in pieces if piece and piece not in shown]
    assert len(missing) <= 3, missing


@pytest.mark.slow
def test_hard_negatives_have_a_word_that_no_true_caption_has() -> None:
    """Oracle: the words of 300 true captions of the same labels. Most hard negatives change the tempo.

    A few have only a new combination of words, as "grand piano" for an electric piano on a grand scale.
    """
    num_tempo = num_without = 0
    for index in range(12):
        row = plan_clip("train", index, seed=5).row
        labels = {name: row[name] for name in ("instrument", "tempo", "style", "dance", "mode", "mood", "chords")}
        labels |= {name: row[name] for name in ("pad", "bass", "drums", "register", "effect")}
        true_words = set(
            " ".join(caption_variants(labels, Random(0), 300))
            .replace("neither fast nor slow", "")
            .replace(".", "")
            .split()
        )
        negatives = hard_negatives(labels, Random(1), 4)
        assert len(set(negatives)) == 4 and negatives == hard_negatives(labels, Random(1), 4)
        for caption in negatives:
            words = {*caption.replace(",", "").replace(".", "").replace(":", "").split()}
            num_without += not words - true_words
            other_tempi = {tempo: words_ for tempo, words_ in vocabulary.TEMPO_WORDS.items() if tempo != row["tempo"]}
            num_tempo += any(word in caption for words_ in other_tempi.values() for word in words_)
    assert num_tempo > 16 and num_without <= 4
