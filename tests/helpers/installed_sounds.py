"""Whether the synthesizer, soundfonts and recorded samples of the toy corpus are installed."""

from musiclm_pytorch.recipes.corpus.render import SOUNDFONTS, find_synthesizer
from musiclm_pytorch.recipes.corpus.samples import LOOPS_BPM, RECORDED_KITS, find_samples


def samples_are_missing() -> bool:
    """Whether a recorded sample is missing."""
    try:
        find_samples([*LOOPS_BPM, "vinyl_hiss", *(name for kit in RECORDED_KITS.values() for name in kit.values())])
    except RuntimeError:
        return True
    return False


def sounds_are_missing() -> bool:
    """Whether the synthesizer, a soundfont or a recorded sample is missing."""
    try:
        for name in SOUNDFONTS:
            find_synthesizer(name)
    except RuntimeError:
        return True
    return samples_are_missing()
