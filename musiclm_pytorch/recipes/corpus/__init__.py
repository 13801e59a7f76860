"""Toy corpus of randomly composed music with captions, synthesized by FluidSynth.

- Music: `composition` composes tunes from the chords of `theory`, and the rhythms of `dances` (folk dances) or of the
  styles that `popular_styles` and `repertoire` declare (in the notation of `styles`). `moods` changes the composition.
- Sound: `performance` and `arrangement` convert tunes to MIDI events for the `instruments`; `midi`, `render`, `samples`
  and `effects` convert the events to waves.
- Text: `captions` generates captions from the words in `wordings`, `vocabulary` and `sentences`.
- Data: `planning` draws the labels of a clip, and `corpus` writes a folder of clips with manifests.
"""

__all__: list[str] = []
