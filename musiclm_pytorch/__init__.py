"""MusicLM (arXiv:2301.11325): music from texts."""

from audiolm_pytorch import __version__
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
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
from musiclm_pytorch.mulan.captions import CaptionSampler
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.bundled import codec_named, encoder_named, mulan_named, tokenizer_named
from musiclm_pytorch.pretrained.model_folder import load_musiclm
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer

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
    "__version__",
    "codec_named",
    "encoder_named",
    "load_musiclm",
    "mulan_named",
    "tokenizer_named",
]
