"""MusicLM (arXiv:2301.11325): music from texts."""

from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch import __version__ as __version__
    from audiolm_pytorch.codecs.base import Codec as Codec
    from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer as TextTokenizer
    from audiolm_pytorch.saving.modules import load_module as load_module, save_module as save_module
    from audiolm_pytorch.semantic.base import FrameEncoder as FrameEncoder, SemanticTokenizer as SemanticTokenizer
    from musiclm_pytorch.generation.prompts import Mixture as Mixture
    from musiclm_pytorch.melody.embedder import MelodyEmbedder as MelodyEmbedder
    from musiclm_pytorch.melody.trainer import MelodyTrainer as MelodyTrainer
    from musiclm_pytorch.mulan import (
        AudioSpectrogramTransformer as AudioSpectrogramTransformer,
        ClapMuLaN as ClapMuLaN,
        JointEmbedding as JointEmbedding,
        LayerContrast as LayerContrast,
        MuLaN as MuLaN,
        SigmoidContrastiveLearning as SigmoidContrastiveLearning,
        SoftmaxContrastiveLearning as SoftmaxContrastiveLearning,
        TextTransformer as TextTransformer,
        TransformersTextEncoder as TransformersTextEncoder,
    )
    from musiclm_pytorch.mulan.captions import CaptionSampler as CaptionSampler
    from musiclm_pytorch.mulan.trainer import MuLaNTrainer as MuLaNTrainer
    from musiclm_pytorch.musicgen.augmentation import Mixing as Mixing, TextAugmentation as TextAugmentation
    from musiclm_pytorch.musicgen.musicgen import AudioGen as AudioGen, MusicGen as MusicGen
    from musiclm_pytorch.musicgen.stereo import stereo_from_mono as stereo_from_mono
    from musiclm_pytorch.musicgen.text_tower import TextTowerEncoder as TextTowerEncoder
    from musiclm_pytorch.musicgen.trainer import MusicGenTrainer as MusicGenTrainer
    from musiclm_pytorch.musicgen.transformer import MusicGenTransformer as MusicGenTransformer
    from musiclm_pytorch.musiclm import MusicLM as MusicLM
    from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer as MuLaNEmbedQuantizer

globals().update(lazy_exports(__name__))
