"""The toy corpus: tunes of our own, played by FluidSynth, with captions.

`theory` and `dances` -> `composition` (tunes) -> `performance` (notes of each player) -> `midi` and `render` (sound);
`wordings` -> `captions` (sentences); `corpus` writes a folder of clips with manifests.
"""

__all__: list[str] = []
