"""The toy corpus: generated tunes with captions, played by FluidSynth.

`composition` generates tunes with `theory` and `dances`. `performance` converts a tune to MIDI events, and `midi` and
`render` convert the events to sound. `captions` writes sentences with `wordings`. `corpus` writes a folder of clips
with manifests.
"""

__all__: list[str] = []
