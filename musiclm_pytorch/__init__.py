"""MusicLM (arXiv 2301.11325) in small modules: a sentence becomes music."""

from audiolm_pytorch.text_tokenizer import TextTokenizer
from musiclm_pytorch.bundle import load_musiclm
from musiclm_pytorch.bundled_parts import codec_named, encoder_named, mulan_named, tokenizer_named
from musiclm_pytorch.captions import CaptionSampler
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.mulan import (
    AudioSpectrogramTransformer,
    ClapMuLaN,
    LayerContrast,
    MuLaN,
    SigmoidContrastiveLearning,
    SoftmaxContrastiveLearning,
    TextTransformer,
    TransformersTextEncoder,
)
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.training import MuLaNTrainer

__all__ = [
    "AudioSpectrogramTransformer",
    "CaptionSampler",
    "ClapMuLaN",
    "LayerContrast",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MuLaNTrainer",
    "MusicLM",
    "SigmoidContrastiveLearning",
    "SoftmaxContrastiveLearning",
    "TextTokenizer",
    "TextTransformer",
    "TransformersTextEncoder",
    "codec_named",
    "encoder_named",
    "load_musiclm",
    "mulan_named",
    "tokenizer_named",
]
