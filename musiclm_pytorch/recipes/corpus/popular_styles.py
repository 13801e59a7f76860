"""Declarations of popular styles."""

from musiclm_pytorch.recipes.corpus.styles import (
    FAST,
    LYRICAL,
    MEDIUM,
    MINOR_CHORDS,
    POP_CHORDS,
    PULSING,
    RIFF,
    ROCK_FILLS,
    SLOW,
    SWINGING,
    TENSE_CHORDS,
    Progression,
    Style,
    evenly,
)

__all__ = ["POPULAR_STYLES"]

POPULAR_STYLES: tuple[Style, ...] = (
    Style(
        name="ballad",
        metres=(LYRICAL,),
        tempi={"slow": SLOW, "medium tempo": (94.0, 104.0)},
        moods=("sad", "romantic", "calm", "dreamy"),
        progressions=POP_CHORDS + MINOR_CHORDS,
        melody=evenly(
            "piano, violin, cello, saxophone, acoustic guitar, flute, clarinet, choir, oboe, "
            "steel guitar, electric piano, string ensemble, french horn, clean electric guitar, "
            "harmonica"
        ),
        chords=evenly(
            "piano chords, piano chords, guitar chords, electric piano chords, steel guitar chords, harp arpeggios"
        ),
        comping=("1-3-4-3-2-3-4-3-", "x-------x---x---", "x---x---x---x---", "1---2---3---4---"),
        pads=evenly("none, none, string chords, synth pad, choir chords"),
        basses=evenly("none, bass guitar, double bass"),
        bass_lines=("r-----r-r-------", "r-------f-------", "r---------r-f---"),
        drums=0.4,
        beats=(
            {"kick": "x.......x.x.....", "rim": "....x.......x...", "hat": "x.o.x.o.x.o.x.o."},
            {"kick": "x.....x.x.......", "snare": "....x.......x...", "ride": "x...x...x...x..."},
        ),
        fills=({"kick": "x.......x.......", "snare": "....x.......x.xx", "hat": "x.o.x.o.x.o....."},),
        kits=("standard", "room", "brush"),
        recorded=0.1,
        effects={None: 0.8, "reverb": 0.15, "low quality": 0.05},
        held=1.0,
        swell=True,
    ),
    Style(
        name="pop",
        metres=(LYRICAL, RIFF),
        tempi={"medium tempo": MEDIUM, "fast": FAST, "slow": (66.0, 76.0)},
        moods=("happy", "energetic", "romantic", "groovy"),
        progressions=POP_CHORDS + MINOR_CHORDS[:3],
        melody=evenly(
            "synth lead, piano, clean electric guitar, electric piano, flute, acoustic guitar, "
            "glockenspiel, marimba, steel guitar, violin, kalimba, synth lead, recorder"
        ),
        chords=evenly(
            "piano chords, electric piano chords, steel guitar chords, electric guitar chords, guitar chords"
        ),
        comping=("x---x---x---x---", "x--x--x-x--x--x-", "x-x-x-x-x-x-x-x-", "x-----x-----x---"),
        pads=evenly("none, none, synth pad, string chords"),
        basses=evenly("bass guitar, bass guitar, synth bass, none"),
        bass_lines=("r-r-r-r-r-r-r-r-", "r--r--r-r--r--r-", "r-----r-r-----r-"),
        drums=0.8,
        beats=(
            {"kick": "x.......x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "x..x..x.x.......", "clap": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
            {
                "kick": "x...x...x...x...",
                "clap": "....x.......x...",
                "open": "..x...x...x...x.",
                "shaker": "xoxoxoxoxoxoxoxo",
            },
        ),
        fills=ROCK_FILLS,
        kits=("standard", "room", "electronic", "808"),
        recorded=0.3,
    ),
    Style(
        name="rock",
        metres=(RIFF,),
        tempi={"medium tempo": MEDIUM, "fast": FAST},
        moods=("energetic", "epic", "dark", "tense"),
        progressions=(
            Progression("mixolydian", "1|7|4|1"),
            Progression("mixolydian", "1|1|7|4"),
            Progression("ionian", "1|5|6|4"),
            Progression("ionian", "1|4|5|4"),
            *MINOR_CHORDS[:4],
            *TENSE_CHORDS[1:2],
        ),
        melody=evenly(
            "distorted electric guitar, distorted electric guitar, distorted electric guitar, "
            "clean electric guitar, electric organ, synth lead, harmonica, piano, saxophone, "
            "trumpet"
        ),
        chords=evenly(
            "distorted guitar chords, distorted guitar chords, electric guitar chords, organ chords, "
            "steel guitar chords"
        ),
        comping=("x-x-x-x-x-x-x-x-", "x---x-x---x-x---", "X.xxX.xxX.xxX.xx", "x-------x-x-x---"),
        basses=evenly("bass guitar"),
        bass_lines=("r-r-r-r-r-r-r-r-", "r-r-r-r-r-r-f-a-", "r---r-r---r-r-r-"),
        drums=0.9,
        beats=(
            {"kick": "x.......x.x.....", "snare": "....X.......X...", "hat": "X.x.X.x.X.x.X.x."},
            {"kick": "x.x.......x.....", "snare": "....X.......X...", "open": "X...X...X...X..."},
            {"kick": "x..x..x.x..x..x.", "snare": "....X.......X...", "ride": "X.x.X.x.X.x.X.x."},
        ),
        fills=ROCK_FILLS,
        kits=("power", "room", "standard"),
        recorded=0.3,
    ),
    Style(
        name="blues",
        metres=(SWINGING, RIFF),
        tempi={"slow": SLOW, "medium tempo": MEDIUM, "fast": (146.0, 166.0)},
        moods=("groovy", "sad", "energetic"),
        progressions=(
            Progression("mixolydian", "1d|1d|1d|1d / 4d|4d|1d|1d / 5d|4d|1d|5d"),
            Progression("mixolydian", "1d|4d|1d|1d / 4d|4d|1d|1d / 5d|4d|1d|1d"),
            Progression("dorian", "1|1|1|1 / 4|4|1|1 / 5|4|1|1"),
        ),
        melody=evenly(
            "harmonica, harmonica, clean electric guitar, distorted electric guitar, saxophone, "
            "piano, electric organ, steel guitar, muted trumpet, trombone, clarinet"
        ),
        chords=evenly("electric guitar chords, piano chords, organ chords, steel guitar chords, none"),
        comping=("x-x-x-x-x-x-x-x-", "x.....x.....x...", "....x.......x...", "x...x...x...x..."),
        basses=evenly("bass guitar, double bass"),
        bass_lines=("r---t---f---t---", "r-r-f-f-o-o-f-f-", "r---r---f---a---"),
        drums=0.75,
        beats=(
            {"kick": "x.......x.....x.", "snare": "....x.......x...", "ride": "x...x.x.x...x.x."},
            {"kick": "x.......x.......", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
        ),
        fills=({"kick": "x.......x.......", "snare": "....x...x.x.x.x.", "ride": "x...x.x........."},),
        kits=("room", "standard", "jazz"),
        chord_size=4,
        swing=2 / 3,
        recorded=0.1,
    ),
    Style(
        name="lo-fi",
        metres=(LYRICAL,),
        tempi={"slow": (66.0, 80.0), "medium tempo": (92.0, 100.0)},
        moods=("calm", "dreamy", "groovy", "sad"),
        progressions=(
            Progression("ionian", "2|5|1|6"),
            Progression("ionian", "4|3|2|1"),
            Progression("aeolian", "1|4|7|3"),
            Progression("dorian", "1|4|1|4"),
            Progression("aeolian", "6|7|1|1"),
        ),
        melody=evenly(
            "electric piano, electric piano, piano, vibraphone, clean electric guitar, music box, "
            "kalimba, flute, saxophone, acoustic guitar, synth lead, harp, muted trumpet"
        ),
        chords=evenly(
            "electric piano chords, electric piano chords, piano chords, guitar chords, electric guitar chords"
        ),
        comping=("x-------x-------", "x-----x---x-----", "x---------x--x--"),
        pads=evenly("none, none, synth pad"),
        basses=evenly("bass guitar, synth bass, double bass"),
        bass_lines=("r-----r-..r-----", "r-------..f-r---", "r--r----..r--r--"),
        drums=1.0,
        beats=(
            {"kick": "x......x..x.....", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "x.....x...x..x..", "rim": "....x.......x...", "hat": "x.xox.x.x.xox.x."},
            {"kick": "x..x......x.....", "snare": "....x.......x..o", "hat": "x.x.x.xxx.x.x.x."},
        ),
        kits=("room", "electronic", "808", "standard"),
        recorded=0.6,
        effects={None: 0.35, "vinyl": 0.4, "reverb": 0.05, "low quality": 0.2},
        chord_size=4,
        swing=0.58,
    ),
    Style(
        name="techno",
        metres=(PULSING,),
        tempi={"medium tempo": (114.0, 124.0), "fast": (138.0, 156.0)},
        moods=("energetic", "dark", "tense", "groovy"),
        progressions=(
            Progression("aeolian", "1|1|6|7"),
            Progression("aeolian", "1|1|1|1 / 1|1|7|1"),
            Progression("phrygian", "1|1|2|1"),
            Progression("aeolian", "1|6|3|7"),
            Progression("dorian", "1|1|4|1"),
            Progression("ionian", "1|1|4|4"),
            Progression("ionian", "6|4|1|5"),
        ),
        melody=evenly(
            "synth lead, synth lead, synth lead, synth pad, marimba, electric piano, piano, kalimba, vibraphone, choir"
        ),
        chords=evenly("synth pad, synth pad, organ chords, piano chords, electric piano chords, string chords, none"),
        comping=("..x...x...x...x.", "x..x..x.x..x..x.", "x..x..x...x..x.."),
        basses=evenly("synth bass"),
        bass_lines=("..r-..r-..r-..r-", "r-r-r-r-r-r-r-r-", "rrorrrorrrorrror", "r--r--r-r--r--o-"),
        drums=0.95,
        beats=(
            {"kick": "X...X...X...X...", "clap": "....x.......x...", "open": "..x...x...x...x."},
            {
                "kick": "X...X...X...X...",
                "hat": "x.x.x.x.x.x.x.x.",
                "open": "..x...x...x...x.",
                "rim": "...x..x....x..x.",
            },
            {"kick": "X...X...X...X...", "snare": "....x.......x...", "hat": "xxxxxxxxxxxxxxxx"},
        ),
        fills=({"kick": "X...X...X.......", "snare": "....x...x.x.xxxx", "open": "..x...x...x....."},),
        kits=("electronic", "808"),
        recorded=0.55,
        held=0.7,
    ),
    Style(
        name="funk",
        metres=(RIFF, PULSING),
        tempi={"medium tempo": MEDIUM},
        moods=("groovy", "happy", "playful"),
        progressions=(
            Progression("dorian", "1|1|1|4"),
            Progression("mixolydian", "1d|1d|4d|1d"),
            Progression("dorian", "1|4|1|4"),
            Progression("mixolydian", "1d|1d|1d|5"),
        ),
        melody=evenly(
            "clean electric guitar, saxophone, brass section, trumpet, electric organ, "
            "electric piano, synth lead, bass guitar, trombone"
        ),
        chords=evenly(
            "electric guitar chords, electric guitar chords, electric piano chords, brass chords, organ chords"
        ),
        comping=("x.xx..x.x.xx..x.", "..x...x...x...xx", "x..x..x.....x.x.", "xx.xx.x.xx.xx.x."),
        basses=evenly("bass guitar, bass guitar, synth bass"),
        bass_lines=("r-.r..o.r-.r.fo.", "r..r..r...o.r.a.", "r-r..or-..f-o.a."),
        drums=0.9,
        beats=(
            {"kick": "x..x..x...x.....", "snare": "....X..o.o..X..o", "hat": "x.xxx.xxx.xxx.xx"},
            {"kick": "x.x.......xx....", "snare": "....X..o....X...", "hat": "xxxxxxxxxxxxxxxx"},
        ),
        fills=({"kick": "x..x..x.........", "snare": "....X...x.xxX.xx", "hat": "x.xxx.xx........"},),
        kits=("standard", "room"),
        recorded=0.4,
        chord_size=4,
        held=0.8,
    ),
    Style(
        name="reggae",
        metres=(RIFF, LYRICAL),
        tempi={"slow": (68.0, 80.0), "medium tempo": (92.0, 104.0)},
        moods=("happy", "calm", "groovy"),
        progressions=POP_CHORDS[:4]
        + MINOR_CHORDS[:3]
        + (Progression("ionian", "1|4|1|4"), Progression("mixolydian", "1|7|1|7")),
        melody=evenly(
            "harmonica, electric organ, trombone, saxophone, trumpet, clean electric guitar, piano, kalimba, synth lead"
        ),
        chords=evenly("electric guitar chords, organ chords, piano chords, steel guitar chords"),
        comping=("....x.......x...", "..x...x...x...x.", "....x-x.....x-x."),
        basses=evenly("bass guitar"),
        bass_lines=("r--r--t-f-......", "..r-r-f---r-t-..", "r-----r-f---t---"),
        drums=0.9,
        beats=(
            {"kick": "........x.......", "rim": "........x.......", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "x...x...x...x...", "rim": "........x.......", "hat": "..x...x...x...x."},
        ),
        fills=({"kick": "........x.......", "snare": "x.xx....x.......", "hat": "....x.x.x.x.x.x."},),
        kits=("standard", "room"),
        recorded=0.15,
    ),
    Style(
        name="country",
        metres=(LYRICAL, RIFF),
        tempi={"slow": (66.0, 76.0), "medium tempo": MEDIUM, "fast": FAST},
        moods=("happy", "sad", "playful", "energetic"),
        progressions=(
            Progression("ionian", "1|1|4|1 / 1|5|5|1"),
            Progression("ionian", "1|4|1|5 / 1|4|5|1"),
            Progression("ionian", "1|5|4|1"),
            Progression("mixolydian", "1|7|4|1"),
            Progression("aeolian", "1|7|1|7 / 6|7|1|1"),
        ),
        melody=evenly(
            "steel guitar, banjo, banjo, harmonica, violin, acoustic guitar, clean electric guitar, piano, accordion"
        ),
        chords=evenly("steel guitar chords, steel guitar chords, guitar chords, piano chords"),
        comping=("1---x---2---x---", "x-x-x-x-x-x-x-x-", "1-x-x-x-1-x-x-x-"),
        basses=evenly("double bass, bass guitar, none"),
        bass_lines=("r-------f-------", "r-------f-----a-", "r---....f---...."),
        drums=0.6,
        beats=(
            {"kick": "x.......x.......", "snare": "....x.......x...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "x.......x.......", "snare": "..x.x.x...x.x.x.", "tambourine": "....x.......x..."},
        ),
        fills=ROCK_FILLS[:1],
        kits=("standard", "brush", "room"),
        recorded=0.1,
    ),
)
