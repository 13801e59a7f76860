"""AudioLM (arXiv:2209.03143): codecs, semantic tokenizers, language models of their tokens, and the training of all."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from audiolm_pytorch.saving.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from audiolm_pytorch.audiolm import AudioLM as AudioLM
    from audiolm_pytorch.codecs import (
        AudioLMSoundStream as AudioLMSoundStream,
        Codec as Codec,
        DacWrapper as DacWrapper,
        EncodecWrapper as EncodecWrapper,
        MimiWrapper as MimiWrapper,
        MusicLMSoundStream as MusicLMSoundStream,
        SoundStream as SoundStream,
        SpectralSoundStream as SpectralSoundStream,
    )
    from audiolm_pytorch.codecs.training import SoundStreamTrainer as SoundStreamTrainer
    from audiolm_pytorch.conditioning.base import ConditionTensor as ConditionTensor
    from audiolm_pytorch.conditioning.fuser import ConditionSpec as ConditionSpec
    from audiolm_pytorch.conditioning.published_text import TextConditioner as TextConditioner
    from audiolm_pytorch.generation.entropy_coder import EntropyCoder as EntropyCoder
    from audiolm_pytorch.generation.request import (
        GeneratedAudio as GeneratedAudio,
        GenerationRequest as GenerationRequest,
    )
    from audiolm_pytorch.generation.wrappers import (
        CoarseTransformerWrapper as CoarseTransformerWrapper,
        FineTransformerWrapper as FineTransformerWrapper,
        SemanticTransformerWrapper as SemanticTransformerWrapper,
    )
    from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer as EntropyTransformer
    from audiolm_pytorch.lm.stages import (
        CoarseTransformer as CoarseTransformer,
        FineTransformer as FineTransformer,
        SemanticTransformer as SemanticTransformer,
    )
    from audiolm_pytorch.lm.task import StageObjective as StageObjective
    from audiolm_pytorch.lm.trainers import (
        CoarseTransformerTrainer as CoarseTransformerTrainer,
        EntropyTransformerTrainer as EntropyTransformerTrainer,
        FineTransformerTrainer as FineTransformerTrainer,
        SemanticTransformerTrainer as SemanticTransformerTrainer,
    )
    from audiolm_pytorch.saving.modules import load_module as load_module, save_module as save_module
    from audiolm_pytorch.semantic import (
        BestRQEncoder as BestRQEncoder,
        FairseqVQWav2Vec as FairseqVQWav2Vec,
        FrameEncoder as FrameEncoder,
        HubertWithKmeans as HubertWithKmeans,
        KMeansTokenizer as KMeansTokenizer,
        KMeansTrainer as KMeansTrainer,
        SemanticTokenizer as SemanticTokenizer,
        deduplicate as deduplicate,
        expand as expand,
        open_encoder as open_encoder,
    )
    from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer as SemanticTokenizerTrainer

globals().update(lazy_exports(__name__))

__version__ = "0.2.0"


def _warn_of_other_distribution() -> None:
    """Warn if a distribution of another project is installed whose files overwrite files of this package."""
    try:
        other = version("audiolm-pytorch")  # its musiclm-pytorch depends on it
    except PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution audiolm-pytorch {other} of another project is installed and has the same import name; run: "
        "pip uninstall audiolm-pytorch musiclm-pytorch && pip install --force-reinstall --no-deps musiclm",
        stacklevel=3,
    )


_warn_of_other_distribution()
