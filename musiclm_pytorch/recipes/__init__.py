"""How the bundled files were made: the corpus recipe (our own compositions, played by FluidSynth).

`theory` -> `composition` (tunes) -> `performance` (who plays what, when) -> `midi` + `render` (sound); `wordings` -> `captions`
(sentences); `corpus` puts them together into a folder of clips with manifests.
"""

__all__: list[str] = []
