"""Declarations of all styles apart from folk dances."""

from musiclm_pytorch.recipes.corpus.dances import MARCH, WALTZ
from musiclm_pytorch.recipes.corpus.popular_styles import POPULAR_STYLES
from musiclm_pytorch.recipes.corpus.styles import (
    FAST,
    HYMN,
    JAZZ_CHORDS,
    LONG,
    LYRICAL,
    MEDIUM,
    MINOR_CHORDS,
    POP_CHORDS,
    SLOW,
    SWINGING,
    TENSE_CHORDS,
    Progression,
    Style,
    evenly,
)

__all__ = ["STYLES"]

_OTHER_STYLES: tuple[Style, ...] = (
    Style(
        name="jazz",
        metres=(SWINGING,),
        tempi={"slow": SLOW, "medium tempo": MEDIUM, "fast": FAST},
        moods=("calm", "happy", "romantic", "energetic"),
        progressions=JAZZ_CHORDS,
        melody=evenly(
            "saxophone, saxophone, saxophone, trumpet, muted trumpet, piano, clarinet, vibraphone, "
            "trombone, clean electric guitar, flute, violin, electric organ, bass guitar"
        ),
        chords=evenly("piano chords, piano chords, electric guitar chords, organ chords, guitar chords, none"),
        comping=("x.....x.......x.", "..x.......x.x...", "x---..x.....x---", "....x-......x-x."),
        basses=evenly("double bass, double bass, double bass, none"),
        bass_lines=("r---t---f---a---", "r---f---t---a---", "r---o---f---a---"),
        drums=0.7,
        beats=(
            {"kick": "o...o...o...o...", "ride": "x...x.x.x...x.x.", "pedal": "....x.......x..."},
            {"ride": "x...x.x.x...x.x.", "pedal": "....x.......x...", "snare": "......o.......o."},
            {"snare": "x...X...x...X...", "hat": "....x.......x...", "kick": "o.......o......."},
        ),
        fills=(
            {
                "ride": "x...x.x.........",
                "snare": "..........x.xx.x",
                "kick": "..............x.",
                "pedal": "....x.......x...",
            },
        ),
        kits=("jazz", "brush"),
        chord_size=4,
        swing=2 / 3,
    ),
    Style(
        name="bossa nova",
        metres=(LYRICAL, SWINGING),
        tempi={"medium tempo": MEDIUM, "slow": (66.0, 76.0), "fast": (146.0, 160.0)},
        moods=("calm", "happy", "romantic", "groovy"),
        progressions=JAZZ_CHORDS,
        melody=evenly(
            "flute, acoustic guitar, saxophone, piano, trumpet, vibraphone, clarinet, "
            "electric piano, harmonica, clean electric guitar, accordion"
        ),
        chords=evenly("guitar chords, guitar chords, guitar chords, piano chords, electric piano chords"),
        comping=("x--x--x---x--x--", "x-..x-x-..x-..x-"),
        basses=evenly("double bass, double bass, bass guitar"),
        bass_lines=("r-----f-f-----r-", "r-----f-------r-"),
        drums=0.7,
        beats=(
            {"kick": "x.....x.x.....x.", "rim": "x..x..x...x..x..", "hat": "x.x.x.x.x.x.x.x."},
            {"rim": "..x..x..x..x..x.", "shaker": "xoxoxoxoxoxoxoxo", "kick": "x.....x.x.....x."},
            {"conga": "..x...xx..x...xx", "low conga": "x.......x.......", "shaker": "xoxoxoxoxoxoxoxo"},
        ),
        kits=("standard", "brush"),
        chord_size=4,
    ),
    Style(
        name="ambient",
        metres=(LONG,),
        tempi={"slow": SLOW, "medium tempo": (94.0, 108.0)},
        moods=("calm", "dreamy", "mysterious", "dark"),
        progressions=(
            Progression("ionian", "1|4|1|4"),
            Progression("ionian", "1|6|4|1"),
            Progression("mixolydian", "1|7|4|1"),
            Progression("aeolian", "1|6|1|7"),
            Progression("dorian", "1|4|1|4"),
            Progression("phrygian", "1|2|1|7"),
        ),
        melody=evenly(
            "synth pad, synth pad, piano, choir, harp, vibraphone, pan flute, kalimba, music box, "
            "electric piano, string ensemble, glockenspiel, cello, clean electric guitar, sitar, "
            "flute"
        ),
        chords=evenly("synth pad, synth pad, string chords, choir chords, harp arpeggios, electric piano chords"),
        comping=("1-2-3-4-3-2-3-4-", "1---2---3---4---", "1-3-2-4-3-5-4-2-"),
        pads=evenly("none, choir chords, synth pad"),
        basses=evenly("none, none, synth bass"),
        bass_lines=("r---------------",),
        drums=0.1,
        beats=(
            {"kick": "x.......x.......", "shaker": "x.x.x.x.x.x.x.x."},
            {"low conga": "x..x..x.x..x..x.", "shaker": "..x...x...x...x."},
        ),
        kits=("electronic", "standard"),
        effects={None: 0.55, "reverb": 0.4, "low quality": 0.05},
        restrike=0.25,
        chord_size=4,
        held=1.0,
        swell=True,
    ),
    Style(
        name="march",
        metres=(MARCH,),
        tempi={"medium tempo": (98.0, 122.0), "fast": (146.0, 160.0), "slow": (62.0, 76.0)},
        moods=("happy", "epic", "playful"),
        progressions=(
            Progression("ionian", "1|1|5|1 / 4|1|5|1"),
            Progression("ionian", "1|5|5|1 / 1|4|1 5|1"),
            Progression("ionian", "1|1|4|5 / 1|4|5|1"),
            Progression("harmonic", "1|4|5|1 / 1|6|5|1"),
            Progression("aeolian", "1|1|7|1 / 3|6|5+|1"),
        ),
        melody=evenly(
            "trumpet, trumpet, trombone, tuba, french horn, clarinet, flute, brass section, "
            "bagpipes, oboe, xylophone, glockenspiel, bassoon"
        ),
        chords=evenly("brass chords, brass chords, brass chords, none, accordion chords"),
        comping=("....x.......x...", "..x...x...x...x."),
        basses=evenly("tuba bass, tuba bass, none"),
        bass_lines=("r.......f.......", "r---....f---...."),
        drums=0.85,
        beats=(
            {"kick": "x.......x.......", "snare": "x.xxx.x.x.xxx.xx"},
            {"kick": "x.......x.......", "snare": "..x.x.x...x.xxxx", "crash": "x..............."},
            {"kick": "x...x...x...x...", "snare": "x...x.xxx...x.x."},
        ),
        fills=({"kick": "x.......x.......", "snare": "xxxxxxxxX.x.X..."},),
        kits=("orchestra", "standard"),
        recorded=0.15,
        held=0.75,
    ),
    Style(
        name="waltz",
        metres=(WALTZ,),
        tempi={"slow": (62.0, 76.0), "medium tempo": MEDIUM, "fast": FAST},
        moods=("happy", "romantic", "dreamy", "playful", "sad"),
        progressions=(
            Progression("ionian", "1|1|5|5 / 5|5|1|1"),
            Progression("ionian", "1|6|2|5 / 1|4|5|1"),
            Progression("ionian", "1|4|5|1"),
            Progression("harmonic", "1|4|5|1 / 6|4|5|1"),
            Progression("aeolian", "1|7|6|5+ / 4|1|5+|1"),
        ),
        melody=evenly(
            "violin, accordion, piano, flute, string ensemble, harp, music box, oboe, cello, "
            "clarinet, glockenspiel, acoustic guitar, harpsichord, choir"
        ),
        chords=evenly("piano chords, string chords, accordion chords, guitar chords, harp arpeggios, none"),
        comping=("1---x---x---", "1---x.......", "1-2-3-4-3-2-", "....x---x---"),
        pads=evenly("none, none, string chords"),
        basses=evenly("none, double bass"),
        bass_lines=("r-----------", "r---f---f---"),
        drums=0.3,
        beats=(
            {"kick": "x...........", "snare": "....o...o...", "hat": "x...x...x..."},
            {"kick": "x...........", "tambourine": "....x...x..."},
        ),
        kits=("brush", "orchestra", "standard"),
        swell=True,
    ),
    Style(
        name="film strings",
        metres=(LONG, LYRICAL),
        tempi={"slow": SLOW, "medium tempo": MEDIUM, "fast": (146.0, 160.0)},
        moods=("epic", "sad", "romantic", "tense", "dark", "mysterious"),
        progressions=MINOR_CHORDS + POP_CHORDS[:3] + TENSE_CHORDS,
        melody=evenly(
            "string ensemble, string ensemble, string ensemble, violin, cello, french horn, oboe, "
            "choir, flute, brass section, piano, harp, bassoon, clarinet"
        ),
        chords=evenly("string chords, string chords, string chords, harp arpeggios, brass chords, piano chords"),
        comping=("1-2-3-4-3-2-3-4-", "x-x-x-x-x-x-x-x-", "x---x---x---x---"),
        pads=evenly("none, choir chords, string chords"),
        basses=evenly("double bass, none"),
        bass_lines=("r---------------", "r-------r-------", "r-r-r-r-r-r-r-r-"),
        drums=0.35,
        beats=(
            {"kick": "X.......x..x....", "low tom": "X..x..x.X..x..x."},
            {"kick": "X...............", "crash": "x...............", "low tom": "....x.x.....x.xx"},
        ),
        kits=("orchestra",),
        effects={None: 0.65, "reverb": 0.3, "low quality": 0.05},
        restrike=0.5,
        held=1.0,
        swell=True,
    ),
    Style(
        name="chorale",
        metres=(HYMN,),
        tempi={"slow": SLOW, "medium tempo": (94.0, 108.0)},
        moods=("calm", "sad", "romantic", "epic"),
        progressions=(
            Progression("ionian", "1 5|6 3|4 1|5 / 1 4|2 5|4 5|1"),
            Progression("ionian", "1 4|1 5|6 2|5 / 4 1|2 6|5 5|1"),
            Progression("ionian", "1 6|4 5|1 4|5 / 6 3|4 1|2 5|1"),
            Progression("aeolian", "1 4|1 5+|6 4|5+ / 3 7|6 4|1 5+|1"),
            Progression("aeolian", "1 7|6 3|4 1|5+ / 1 4|7 3|6 5+|1"),
        ),
        melody=evenly(
            "church organ, church organ, choir, choir, string ensemble, brass section, trumpet, "
            "oboe, recorder, french horn, harpsichord"
        ),
        chords=evenly("choir chords, organ chords, brass chords, string chords"),
        comping=("x---x---x---x---",),
        basses=evenly("none"),
        effects={None: 0.7, "reverb": 0.25, "low quality": 0.05},
        restrike=1.0,
        held=1.0,
    ),
)

# Every value of the label `style` apart from "folk dance".
STYLES: dict[str, Style] = {style.name: style for style in (*POPULAR_STYLES, *_OTHER_STYLES)}
