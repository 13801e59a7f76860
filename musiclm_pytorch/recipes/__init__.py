"""How the bundled files were made: the corpus recipe (our own compositions, played by FluidSynth).

`theory` and `dances` -> `composition` (tunes) -> `performance` (who plays what, when) -> `midi` and `render` (sound);
`wordings` -> `captions` (sentences); `corpus` puts them together into a folder of clips with manifests.
"""

__all__: list[str] = []
