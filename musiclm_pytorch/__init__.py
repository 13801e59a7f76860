"""MusicLM (arXiv 2301.11325) in small modules: a sentence becomes music."""

from musiclm_pytorch.bundle import load_musiclm
from musiclm_pytorch.bundled_parts import codec_named, encoder_named, tokenizer_named
from musiclm_pytorch.embed_quantizer import MuLaNEmbedQuantizer
from musiclm_pytorch.mulan import AudioSpectrogramTransformer, MuLaN, TextTransformer
from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.tokenizer import TextTokenizer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.training import MuLaNTrainer

__all__ = [
    "AudioSpectrogramTransformer",
    "MuLaN",
    "MuLaNEmbedQuantizer",
    "MuLaNTrainer",
    "MusicLM",
    "SigmoidContrastiveLearning",
    "SoftmaxContrastiveLearning",
    "TextTokenizer",
    "TextTransformer",
    "codec_named",
    "encoder_named",
    "load_musiclm",
    "tokenizer_named",
]
