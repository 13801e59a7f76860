"""Toy corpus of randomly composed music with captions, synthesized by FluidSynth.

The module `composition` composes tunes from chords in `theory` and rhythms in `dances`. The module `performance`
converts tunes to MIDI events, which `midi` and `render` convert to sound. The module `captions` generates captions from
the words in `wordings`. The module `corpus` writes a folder of clips with manifests.
"""

__all__: list[str] = []
