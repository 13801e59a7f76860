"""MuLaN: the joint embedding of music and text (arXiv:2208.12415)."""

from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.mulan import MuLaN, average_latents
from musiclm_pytorch.mulan.text_tower import TextTransformer
from musiclm_pytorch.mulan.tokenizer import TextTokenizer

__all__ = [
    "AudioSpectrogramTransformer",
    "MuLaN",
    "SigmoidContrastiveLearning",
    "SoftmaxContrastiveLearning",
    "TextTokenizer",
    "TextTransformer",
    "average_latents",
]
