"""Words and templates of captions, separately for training captions and held-out captions.

Held-out captions contain phrases that training captions lack, but the main words occur in both. For example, "at a
quick pace" is a held-out phrase, and training captions contain "quick" and "at a brisk pace". Instruments and dances
have equal names in training captions and in held-out captions.

Caption templates are sentences with slots. Words for the labels of a clip fill the slots `{instrument}`, `{tempo}`,
`{pace}`, `{dance}`, `{mode}` and `{key}`. Words for the accompaniment fill the slot `{backing}`. Words for the pitch
range of the melody fill the slot `{register}`, which often stays empty. The article "a" or "an" replaces the slot
`a(n)`.
"""

from typing import NamedTuple

from musiclm_pytorch.recipes.corpus.instruments import INSTRUMENTS
from musiclm_pytorch.recipes.corpus.vocabulary import STYLE_CHORDS

__all__ = ["HELD_OUT", "TRAINING", "Wordings"]


class Wordings(NamedTuple):
    """Words for every value of every label, and caption templates. A word listed twice has double probability."""

    instrument: dict[str, tuple[str, ...]]
    tempo: dict[str, tuple[str, ...]]
    pace: dict[str, tuple[str, ...]]
    dance: dict[str, tuple[str, ...]]
    mode: dict[str, tuple[str, ...]]
    key: dict[str, tuple[str, ...]]
    chords: dict[str, tuple[str, ...]]
    drums: tuple[str, ...]
    solo: tuple[str, ...]
    register: dict[str, tuple[str, ...]]
    full: tuple[str, ...]
    partial: tuple[str, ...]


_PLAIN_INSTRUMENTS: dict[str, tuple[str, ...]] = {name: (name,) for name in INSTRUMENTS}
_PLAIN_DANCES: dict[str, tuple[str, ...]] = {
    name: (name,)
    for name in (
        "christmas carol",
        "country dance",
        "folk tune",
        "hornpipe",
        "jig",
        "morris dance",
        "reel",
        "slip jig",
        "waltz",
    )
}

TRAINING = Wordings(
    instrument=_PLAIN_INSTRUMENTS
    | {
        "acoustic guitar": ("acoustic guitar",) * 5 + ("nylon-string guitar", "classical guitar", "guitar"),
        "bagpipes": ("bagpipes",) * 3 + ("bagpipe", "highland bagpipes"),
        "banjo": ("banjo",) * 4 + ("country banjo", "plucked banjo"),
        "bass guitar": ("bass guitar",) * 3 + ("bass", "electric bass guitar"),
        "brass section": ("brass section",) * 3 + ("brass", "brass ensemble", "brass band"),
        "cello": ("cello",) * 5 + ("deep cello",),
        "choir": ("choir",) * 5 + ("singing choir", "choir of voices", "vocal choir"),
        "church organ": ("church organ",) * 5 + ("pipe organ", "organ"),
        "clean electric guitar": ("clean electric guitar",) * 3 + ("electric guitar", "clean guitar", "jazz guitar"),
        "distorted electric guitar": ("distorted electric guitar",) * 4
        + ("electric guitar with distortion", "distorted guitar", "electric guitar", "overdriven electric guitar"),
        "electric organ": ("electric organ",) * 3 + ("hammond organ", "organ"),
        "electric piano": ("electric piano",) * 3 + ("rhodes", "keyboard", "electric keyboard"),
        "flute": ("flute",) * 7 + ("concert flute",),
        "french horn": ("french horn",) * 3 + ("horn",),
        "glockenspiel": ("glockenspiel",) * 3 + ("bells", "glockenspiel bells"),
        "harmonica": ("harmonica",) * 3 + ("blues harp", "mouth organ"),
        "harp": ("harp",) * 4 + ("plucked harp", "concert harp"),
        "kalimba": ("kalimba",) * 3 + ("thumb piano",),
        "marimba": ("marimba",) * 7 + ("wooden marimba",),
        "piano": ("piano",) * 6 + ("grand piano", "acoustic piano"),
        "recorder": ("recorder",) * 3 + ("wooden recorder", "recorder flute"),
        "saxophone": ("saxophone",) * 4 + ("sax", "alto saxophone", "saxophone"),
        "sitar": ("sitar",) * 3 + ("indian sitar",),
        "steel guitar": ("steel guitar",) * 2
        + ("steel string guitar", "acoustic guitar", "steel string acoustic guitar"),
        "string ensemble": ("string ensemble",) * 3 + ("strings", "string orchestra", "violins", "string section"),
        "synth lead": ("synth lead",) * 3
        + ("synth", "synthesizer", "lead synth", "digital synthesizer", "synthesiser"),
        "synth pad": ("synth pad",) * 3 + ("synth", "ambient synth", "synthesizer pad", "warm pad"),
        "vibraphone": ("vibraphone",) * 3 + ("vibes",),
        "violin": ("violin",) * 5 + ("fiddle", "folk violin"),
    },
    tempo={
        "slow": ("slow",) * 5 + ("calm", "gentle", "leisurely", "slow-paced", "slow tempo", "relaxed"),
        "medium tempo": ("medium tempo",) * 5 + ("moderate", "mid-tempo", "medium-paced", "moderate tempo"),
        "fast": ("fast",) * 5 + ("quick", "lively", "up-tempo", "brisk", "rapid", "energetic", "fast-paced"),
    },
    pace={
        "slow": ("slow", "slowly", "at a slow tempo", "at a slow pace", "at a leisurely pace", "taken slowly"),
        "medium tempo": (
            "medium tempo",
            "at a medium tempo",
            "at a moderate tempo",
            "at a moderate pace",
            "neither fast nor slow",
        ),
        "fast": (
            "fast",
            "at a fast tempo",
            "at a brisk pace",
            "at a fast pace",
            "at a lively tempo",
            "up-tempo",
            "played quickly",
        ),
    },
    dance=_PLAIN_DANCES
    | {
        "christmas carol": ("christmas carol",) * 3 + ("carol", "christmas song"),
        "country dance": ("country dance",) * 3 + ("country dance tune",),
        "folk tune": ("folk tune",) * 3 + ("folk song", "folk melody"),
        "hornpipe": ("hornpipe",) * 4 + ("dotted hornpipe",),
        "jig": ("jig",) * 5 + ("jig in 6/8", "irish jig"),
        "morris dance": ("morris dance",) * 3 + ("morris tune",),
        "reel": ("reel",) * 5 + ("reel in 4/4", "irish reel"),
        "slip jig": ("slip jig",) * 3 + ("slip jig in 9/8",),
        "waltz": ("waltz",) * 5 + ("waltz in 3/4", "waltz in three-four time"),
    },
    mode={
        "major": ("major",) * 3 + ("cheerful major", "bright major"),
        "minor": ("minor",) * 3 + ("sad minor", "melancholic minor"),
    },
    key={
        "major": ("major", "major", "a major key", "a bright major key"),
        "minor": ("minor", "minor", "a minor key", "a dark minor key"),
    },
    chords={
        "guitar chords": ("guitar chords",) * 4 + ("guitar accompaniment", "chords on the guitar", "a strummed guitar"),
        "piano chords": ("piano chords",) * 4 + ("piano accompaniment", "chords on the piano", "a piano behind it"),
        "string chords": ("string chords",) * 4 + ("string accompaniment", "strings", "sustained strings"),
    }
    | STYLE_CHORDS,
    drums=("drums",) * 4 + ("a drum kit", "percussion", "a drum beat"),
    solo=(" solo", " alone", ", unaccompanied", " solo", ", without accompaniment", ", no accompaniment", " by itself"),
    register={
        "low": (" in a low register",) * 3 + (" in the low register", ", low-pitched", ", low notes"),
        "mid": ("",) * 8 + (" in a middle register", " in the middle register"),
        "high": (" in a high register",) * 3 + (" in the high register", ", high-pitched", ", high notes"),
    },
    full=(
        "a(n) {tempo} {dance} played on the {instrument}{backing}{register}",
        "a(n) {tempo} {dance} played on the {instrument}{backing}",
        "folk music: {instrument}{backing}, {tempo}{register}",
        "{tempo} {instrument} music{backing}{register}, {dance} in {key}",
        "{tempo} {instrument} music{backing}, {dance} in {key}",
        "{instrument} playing a(n) {tempo} {mode} {dance}{backing}{register}",
        "a(n) {mode} {dance}, {tempo}, {instrument}{backing}{register}",
        "a(n) {dance} in {key} for {instrument}{backing}, {pace}{register}",
        "the {instrument} plays a(n) {tempo} {dance}{backing}{register}",
        "{instrument}{backing}, {tempo} {dance} in {key}{register}",
        "{pace}: a(n) {dance} on the {instrument}{backing}{register}",
        "this is a(n) {tempo} {mode} {dance} performed on the {instrument}{backing}{register}",
        "instrumental folk music with a(n) {instrument}{backing}, {tempo}, {dance}{register}",
        "a(n) {instrument} melody{backing}{register}, {pace}, like a(n) {dance}",
        "{dance} for {instrument}{backing}, {pace}",
        "a(n) {tempo} piece for {instrument}{backing}{register}",
        "someone plays a(n) {dance} on the {instrument} {pace}{backing}",
        "{tempo}, {mode}, {instrument}{backing}{register}",
    ),
    partial=(
        "{instrument}",
        "a(n) {instrument}",
        "{instrument} music",
        "{tempo} {instrument}",
        "{tempo} {instrument} music",
        "{instrument}, {tempo}",
        "{instrument} {pace}",
        "{tempo} solo {instrument}",
        "solo {instrument}",
        "a(n) {instrument} solo, {pace}",
        "a(n) {dance} on the {instrument}",
        "a(n) {dance} played on the {instrument}",
        "a(n) {tempo} {dance} on the {instrument}",
        "a(n) {tempo} {dance} played on a(n) {instrument}",
        "{instrument}{backing}",
        "{instrument} music{backing}",
        "{tempo} music with {instrument}{backing}",
        "{instrument}{backing}, {tempo}",
        "the sound of a(n) {instrument}",
        "a(n) {instrument} tune in {key}",
        "a(n) {instrument} melody{register}",
        "a(n) {tempo} melody on the {instrument}",
        "{instrument} playing a(n) {tempo} tune{backing}",
        "{tempo} {mode} {dance}{backing}",
    ),
)

HELD_OUT = Wordings(
    instrument=_PLAIN_INSTRUMENTS,
    tempo={
        "slow": ("slow and gentle", "slow-tempo", "calm and slow"),
        "medium tempo": ("moderately fast", "moderate-tempo", "medium-pace"),
        "fast": ("quick and lively", "fast-tempo", "brisk and fast"),
    },
    pace={
        "slow": ("at a calm pace", "played slowly", "at a gentle tempo"),
        "medium tempo": ("at a medium pace", "in a moderate tempo", "at a mid-tempo pace"),
        "fast": ("at a quick pace", "at a rapid tempo", "taken fast"),
    },
    dance=_PLAIN_DANCES,
    mode={"major": ("major-key", "bright"), "minor": ("minor-key", "sad")},
    key={"major": ("a cheerful major key",), "minor": ("a sad minor key",)},
    chords={
        "guitar chords": ("chords from a guitar", "a guitar playing chords"),
        "piano chords": ("chords from a piano", "a piano playing chords"),
        "string chords": ("chords from strings", "strings playing chords"),
    }
    | {name: (f"background {name}",) for name in STYLE_CHORDS},
    drums=("a drum rhythm", "drums playing along"),
    solo=(" with no other instruments", " all alone", ", a solo"),
    register={
        "low": (" on low notes", " in a low-pitched register"),
        "mid": ("", ""),
        "high": (" on high notes", " in a high-pitched register"),
    },
    full=(
        "we hear a(n) {instrument}{backing}{register}: a(n) {tempo} {dance} in {key}",
        "a(n) {tempo} tune, a(n) {mode} {dance}, with the {instrument}{backing}{register}",
        "a piece of folk music, {pace}, for the {instrument}{backing}{register}",
        "a(n) {mode} {dance} {pace} on a(n) {instrument}{backing}{register}",
        "music for {instrument}{backing}: {dance}, {tempo}{register}",
    ),
    partial=(
        "a tune on the {instrument}, {pace}",
        "the {instrument} playing {pace}",
        "a(n) {tempo} performance on the {instrument}",
    ),
)
