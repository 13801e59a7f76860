"""MuLaN: the joint embedding of music and text (arXiv:2208.12415)."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from musiclm_pytorch.mulan.audio_tower import AudioSpectrogramTransformer as AudioSpectrogramTransformer
    from musiclm_pytorch.mulan.clap import ClapMuLaN as ClapMuLaN
    from musiclm_pytorch.mulan.joint import JointEmbedding as JointEmbedding, average_latents as average_latents
    from musiclm_pytorch.mulan.layers import LayerContrast as LayerContrast
    from musiclm_pytorch.mulan.losses import (
        SigmoidContrastiveLearning as SigmoidContrastiveLearning,
        SoftmaxContrastiveLearning as SoftmaxContrastiveLearning,
    )
    from musiclm_pytorch.mulan.mulan import MuLaN as MuLaN
    from musiclm_pytorch.mulan.pretrained_text import TransformersTextEncoder as TransformersTextEncoder
    from musiclm_pytorch.mulan.text_tower import (
        TextTower as TextTower,
        TextTransformer as TextTransformer,
        words_of as words_of,
    )

globals().update(lazy_exports(__name__))
