"""Base classes of semantic tokenizers and of the encoders that k-means tokenizers are built on."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from audiolm_pytorch.audio.padding import check_waves, resampled_items

__all__ = ["FrameEncoder", "SemanticTokenizer"]


class SemanticTokenizer(nn.Module, ABC):
    """Waves to one sequence of tokens that describe content rather than sound (AudioLM, arXiv:2209.03143, sec. III-B).

    A tokenizer is always in eval mode, also as a part of a module that trains.

    Attributes:
        target_sample_hz: Rate of the waves that the tokenizer works on.
        downsample_factor: Samples per token at that rate; `num_frames` returns the exact number of tokens.
        codebook_size: Number of different tokens.
        seq_len_multiple_of: Samples at `target_sample_hz`: waves are cut to a multiple of it. None = no cut.
    """

    target_sample_hz: int
    downsample_factor: int
    codebook_size: int
    seq_len_multiple_of: int | None = None

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Tokens of a wave of `num_samples` samples at `target_sample_hz`; ValueError if shorter than one token."""

    @abstractmethod
    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        """Tokenize waves.

        Args:
            wave: `[b, n]`, float.
            input_sample_hz: Rate of `wave`, which is resampled if it differs. None = `target_sample_hz`.
            lengths: `[b]` int, samples of each item; what follows them is padding. None = no padding.

        Returns:
            Ids `[b, t]` int64 in `[0, codebook_size)`, -1 past an item's own `num_frames`. An item has the same ids
            alone and in a batch.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that the tokens depend on. Models store it with what they learned from the tokens."""

    def train(self, mode: bool = True) -> "SemanticTokenizer":
        """Stay in eval mode."""
        return super().train(False)

    def cut_samples(self, num_samples: int) -> int:
        """Length of a wave after the cut to a multiple of `seq_len_multiple_of`."""
        return num_samples - num_samples % (self.seq_len_multiple_of or 1)

    def checked_waves(
        self, wave: Tensor, input_sample_hz: int | None, lengths: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Check the arguments of `forward`; return waves at `target_sample_hz` and their lengths."""
        check_waves(wave, lengths, device)
        if input_sample_hz is None or input_sample_hz == self.target_sample_hz:
            return wave, lengths
        return resampled_items(wave, input_sample_hz, self.target_sample_hz, lengths)


class FrameEncoder(nn.Module, ABC):
    """An audio encoder whose hidden states `KMeansTokenizer` turns into tokens.

    Attributes:
        sample_hz: Rate of the waves.
        downsample_factor: Samples per frame at that rate; `num_frames` returns the exact number of frames.
        dim: Width of the features.
        depth: Number of layers.
    """

    sample_hz: int
    downsample_factor: int
    dim: int
    depth: int

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Frames of a wave of `num_samples` samples; ValueError if it is too short for one frame."""

    @abstractmethod
    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of a layer.

        Args:
            wave: `[b, n]`, float, at `sample_hz`.
            lengths: `[b]` int, samples of each item; what follows them is padding. None = no padding.
            layer: 0..depth, where 0 is the input of the first layer. None = the last layer.

        Returns:
            Features `[b, t, d]` and the mask `[b, t]` bool of real frames. Padding does not change real frames.
        """

    @abstractmethod
    def truncated(self, layer: int) -> "FrameEncoder":
        """An independent copy that ends after `layer` (0..depth) and has the same hidden states up to there."""

    def check_layer(self, layer: int) -> None:
        """Check that the encoder has a layer."""
        if not 0 <= layer <= self.depth:
            raise ValueError(f"layer must be in 0..{self.depth}, the layers of this {type(self).__name__}; got {layer}")
