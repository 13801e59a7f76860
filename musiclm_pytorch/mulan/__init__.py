"""MuLaN: the joint embedding of music and text (arXiv:2208.12415)."""

from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer
from musiclm_pytorch.mulan.clap import ClapMuLaN
from musiclm_pytorch.mulan.joint import JointEmbedding, average_latents
from musiclm_pytorch.mulan.layers import LayerContrast
from musiclm_pytorch.mulan.losses import SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.mulan import MuLaN
from musiclm_pytorch.mulan.pretrained_text import TransformersTextEncoder
from musiclm_pytorch.mulan.text_tower import TextTower, TextTransformer, words_of

__all__ = [
    "AudioSpectrogramTransformer",
    "ClapMuLaN",
    "JointEmbedding",
    "LayerContrast",
    "MuLaN",
    "SigmoidContrastiveLearning",
    "SoftmaxContrastiveLearning",
    "TextTower",
    "TextTransformer",
    "TransformersTextEncoder",
    "average_latents",
    "words_of",
]
