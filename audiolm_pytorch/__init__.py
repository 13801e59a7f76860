"""AudioLM (arXiv:2209.03143): codecs, semantic tokenizers, language models of their tokens, and the training of all."""

import warnings
from importlib.metadata import PackageNotFoundError, version

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import (
    AudioLMSoundStream,
    DacWrapper,
    EncodecWrapper,
    MimiWrapper,
    MusicLMSoundStream,
    SoundStream,
    SpectralSoundStream,
    open_codec,
)
from audiolm_pytorch.codecs.training import SoundStreamTrainer
from audiolm_pytorch.conditioning.fuser import ConditionSpec
from audiolm_pytorch.conditioning.tensors import ConditionTensor
from audiolm_pytorch.conditioning.text_conditioner import TextConditioner
from audiolm_pytorch.generation.request import GeneratedAudio, GenerationRequest
from audiolm_pytorch.generation.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
)
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.trainers import CoarseTransformerTrainer, FineTransformerTrainer, SemanticTransformerTrainer
from audiolm_pytorch.nn.half_weights import with_half_weights
from audiolm_pytorch.semantic import (
    BestRQEncoder,
    FairseqVQWav2Vec,
    HubertWithKmeans,
    KMeansTokenizer,
    KMeansTrainer,
    deduplicate,
    expand,
    open_encoder,
)
from audiolm_pytorch.semantic.best_rq.training import SemanticTokenizerTrainer

__version__ = "0.2.0"

__all__ = [
    "AudioLM",
    "AudioLMSoundStream",
    "BestRQEncoder",
    "CoarseTransformer",
    "CoarseTransformerTrainer",
    "CoarseTransformerWrapper",
    "ConditionSpec",
    "ConditionTensor",
    "DacWrapper",
    "EncodecWrapper",
    "FairseqVQWav2Vec",
    "FineTransformer",
    "FineTransformerTrainer",
    "FineTransformerWrapper",
    "GeneratedAudio",
    "GenerationRequest",
    "HubertWithKmeans",
    "KMeansTokenizer",
    "KMeansTrainer",
    "MimiWrapper",
    "MusicLMSoundStream",
    "SemanticTokenizerTrainer",
    "SemanticTransformer",
    "SemanticTransformerTrainer",
    "SemanticTransformerWrapper",
    "SoundStream",
    "SoundStreamTrainer",
    "SpectralSoundStream",
    "TextConditioner",
    "deduplicate",
    "expand",
    "open_codec",
    "open_encoder",
    "with_half_weights",
]


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
