"""Base classes of semantic tokenizers, and of the audio encoders that k-means tokenizers use."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from audiolm_pytorch.audio.resample import resampled_items
from audiolm_pytorch.audio.waves import mono_waves
from audiolm_pytorch.saving.modules import SavedModule

__all__ = ["FrameEncoder", "SemanticTokenizer"]


class SemanticTokenizer(SavedModule, ABC):
    """Base class of tokenizers that convert waves to semantic tokens (AudioLM, arXiv:2209.03143, section III-B).

    A tokenizer is always in eval mode, also if it is a submodule of a module in train mode.

    Attributes:
        downsample_factor: Samples per token at `target_sample_hz`; `num_frames` returns the exact number of tokens.
        seq_len_multiple_of: Waves are cut to a multiple of this number of samples; None means no cut.
    """

    pipeline_tag = "feature-extraction"

    target_sample_hz: int
    downsample_factor: int
    codebook_size: int
    seq_len_multiple_of: int | None = None

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Return the number of tokens of a wave of `num_samples` samples; raise a ValueError if the number is 0."""

    @abstractmethod
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves.

        Args:
            wave: `[n]`, `[b, n]` or `[b, 1, n]`, float.
            input_sample_hz: Sample rate of `wave`, which is resampled if necessary; None means `target_sample_hz`.
            lengths: `[b]` int, number of samples of each item without padding; None means no padding.

        Returns:
            Token ids `[b, t]` int64 in `[0, codebook_size)`, and -1 at padding after the last token of an item. The
            ids of an item do not depend on the other items of the batch.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of everything that the tokens depend on; models trained on the tokens store this hash."""

    def train(self, mode: bool = True) -> "SemanticTokenizer":
        """Keep the tokenizer in eval mode and ignore `mode`."""
        return super().train(False)

    def cut_samples(self, num_samples: int) -> int:
        """Return the length of a wave after the cut to a multiple of `seq_len_multiple_of`."""
        return num_samples - num_samples % (self.seq_len_multiple_of or 1)

    def checked_waves(
        self, wave: Tensor, input_sample_hz: int | None, lengths: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Check the arguments of `forward`; return waves `[b, n]` at `target_sample_hz`, and their lengths."""
        wave = mono_waves(wave, lengths, device)
        if input_sample_hz is None or input_sample_hz == self.target_sample_hz:
            return wave, lengths
        return resampled_items(wave, input_sample_hz, self.target_sample_hz, lengths)


class FrameEncoder(SavedModule, ABC):
    """Base class of audio encoders whose hidden states `KMeansTokenizer` converts to tokens."""

    pipeline_tag = "feature-extraction"
    held_as = "encoder"  # of a k-means tokenizer

    sample_hz: int
    downsample_factor: int  # samples per frame; `num_frames` returns the exact number of frames
    dim: int  # width of the hidden states
    depth: int  # number of layers

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames of a wave of `num_samples` samples; raise a ValueError if the number is 0."""

    @abstractmethod
    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute the hidden states of a layer.

        Args:
            wave: `[n]`, `[b, n]` or `[b, 1, n]`, float, at `sample_hz`.
            lengths: `[b]` int, number of samples of each item without padding; None means no padding.
            layer: Number of the layer, 0..depth, where 0 is the input of the first layer; None means the last layer.

        Returns:
            Hidden states `[b, t, d]`, which do not depend on padding, and a mask `[b, t]` bool, False at padding.
        """

    @abstractmethod
    def truncated(self, layer: int) -> "FrameEncoder":
        """Copy the encoder without the layers after `layer`; hidden states of the remaining layers do not change."""

    def check_layer(self, layer: int) -> None:
        """Check that the number of a layer is in 0..depth."""
        if not 0 <= layer <= self.depth:
            raise ValueError(f"layer must be in 0..{self.depth}, the layers of this {type(self).__name__}; got {layer}")
