"""Entropy coding of codes: a range coder with the probabilities of an `EntropyTransformer`.

Encoder and decoder must compute equal probabilities, or every later code would be wrong. Encoding computes all rows of
a window at the same time, decoding row by row, perhaps on another machine, so that logits differ by rounding errors.
The logits are computed in float64, with errors of up to 1e-14, and rounded to multiples of 1/8. Two roundings differ
less than once in a year of audio, and the checksum of the window then raises an error. The coarse logits lengthen the
codes by less than 0.1 %. Rounded logits become integer weights by a table, and the range coder computes exactly.
"""

import math
import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.generation.decode_session import DecodeSession
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.lm.entropy_transformer import EntropyTransformer
from audiolm_pytorch.nn.cached_transformer import CachedTransformer

__all__ = ["EntropyCoder"]

_STREAM, _WORDS, _CHECKSUMS = "codes", "entropy_words", "entropy_checksums"
_MAX_WINDOW_FRAMES = 512
_STEPS_PER_NAT = 8
# Weight of a code by the number of steps from the highest logit to its logit, from 2^20 to 1.
_WEIGHTS = torch.tensor(
    [round(2**20 * math.exp(-step / _STEPS_PER_NAT)) for step in range(math.ceil(_STEPS_PER_NAT * math.log(2**20)))],
    dtype=torch.float64,
)
_DAMAGED = (
    "the entropy-coded codes are damaged, or this machine computes other probabilities than the one that encoded them; "
    "encode the sound again"
)


class EntropyCoder:
    """Encodes the codes of a codec in fewer bits, and decodes exactly the same codes, on the CPU.

    Codes are coded in windows of the length that the model was trained on, at most 512 frames. The first half of a
    window repeats earlier frames, from which the others are predicted. Memory does not depend on the number of windows,
    apart from the codes.

    Args:
        model: The entropy model; its weights are copied.

    Attributes:
        fingerprint: Fingerprint of the model.
        num_quantizers: Largest number of codes per frame.
    """

    @typed
    def __init__(self, model: EntropyTransformer) -> None:
        try:
            from constriction import stream
        except ImportError as error:
            raise ImportError('entropy coding needs constriction: pip install "musiclm[entropy]"') from error
        self.model, self.fingerprint, self.num_quantizers = model, model.fingerprint(), len(model.layout.heads)
        self._queue, self._family = stream.queue, stream.model.Categorical(perfect=False)
        self._model = self._selected = model.first_levels(self.num_quantizers)
        window = min(model.window_frames or _MAX_WINDOW_FRAMES, _MAX_WINDOW_FRAMES)
        self._num_context = window // 2
        self._num_new = window - self._num_context

    @typed
    @torch.inference_mode()
    def encode(self, codes: Tensor) -> dict[str, Tensor]:
        """Encode codes `[f, q']` int64 of the first q' quantizers.

        Returns:
            `entropy_words [w]` int32 of the range coder, and `entropy_checksums [windows]` int32 of the codes.
        """
        model, encoder = self._first_levels(codes.shape[1]), self._queue.RangeEncoder()
        codes, checksums = codes.cpu(), []
        for start, first, last in self._windows(len(codes)):
            symbols, weights = _predict(model, codes[start:last], first - start)
            encoder.encode(symbols.int().numpy(), self._family, weights.numpy())
            checksums.append(_checksum(codes[first:last]))
        arrays = {_WORDS: encoder.get_compressed(), _CHECKSUMS: np.array(checksums, dtype=np.uint32)}
        return {name: torch.from_numpy(array.view(np.int32)) for name, array in arrays.items()}

    @typed
    def decode(self, tensors: Mapping[str, Tensor], num_frames: int, num_levels: int) -> Tensor:
        """Decode the codes `[num_frames, num_levels]` int64 from the result of `encode`.

        Raises:
            ValueError: If the tensors are damaged, or were encoded with other probabilities.
        """
        words, checksums = (tensors.get(name) for name in (_WORDS, _CHECKSUMS))
        num_windows = -(-num_frames // self._num_new)
        if words is None or words.dtype != torch.int32 or words.ndim != 1 or not len(words):
            raise ValueError(f"the tensor {_WORDS} of entropy-coded codes must be int32 [w]; encode the sound again")
        if checksums is None or checksums.dtype != torch.int32 or checksums.shape != (num_windows,):
            raise ValueError(
                f"the tensor {_CHECKSUMS} of {num_frames} entropy-coded frames must be int32 [{num_windows}]; encode "
                "the sound again"
            )
        model = self._first_levels(num_levels)
        decoder = self._queue.RangeDecoder(words.numpy().view(np.uint32))

        def sampler(logits: Tensor, noise: Tensor, settings: SamplingSettings) -> Tensor:
            symbols = decoder.decode(self._family, _weights(logits[0]).numpy())
            return torch.from_numpy(symbols).long().unsqueeze(0)

        chunks = [torch.zeros(0, num_levels, dtype=torch.long)]
        transformer: CachedTransformer | None = None
        for (start, first, last), checksum in zip(self._windows(num_frames), checksums.numpy().view(np.uint32)):
            context = {_STREAM: chunks[-1][len(chunks[-1]) - (first - start) :].unsqueeze(0)}
            session = DecodeSession(
                model, context, {_STREAM: last - start}, seeds=[0], transformer=transformer, sampler=sampler
            )
            try:
                session.advance()
            except AssertionError as error:  # the range decoder raises it for words that no encoder writes
                raise ValueError(_DAMAGED) from error
            transformer = session.transformer
            chunks.append(session.decoded().streams[_STREAM][0, first - start :])
            if _checksum(chunks[-1]) != checksum:
                raise ValueError(_DAMAGED)
        return torch.cat(chunks)

    def _first_levels(self, num_levels: int) -> EntropyTransformer:
        """Return the model of the first levels in float64."""
        if not 1 <= num_levels <= self.num_quantizers:
            raise ValueError(f"num_levels must be in 1..{self.num_quantizers}, got {num_levels}; use another model")
        if len(self._selected.layout.heads) != num_levels:
            self._selected = self._model.first_levels(num_levels)
        return self._selected

    def _windows(self, num_frames: int) -> Iterator[tuple[int, int, int]]:
        """Yield the first frame of each window, the first frame that it codes, and its end."""
        for first in range(0, num_frames, self._num_new):
            yield max(0, first - self._num_context), first, min(first + self._num_new, num_frames)


def _predict(model: EntropyTransformer, codes: Tensor, num_context: int) -> tuple[Tensor, Tensor]:
    """Predict the codes `[f, q]` of a window after its first `num_context` frames.

    Returns:
        The predicted codes `[n]` in the order of decoding, and the weights `[n, v]` of all codes at their places.
    """
    layout, streams = model.layout, {_STREAM: codes.unsqueeze(0)}
    packed = layout.pack(streams)
    grid = layout.grid({_STREAM: streams[_STREAM][:, :num_context]}, {_STREAM: len(codes)}, 1)
    hidden = model.hidden(packed.ids[:, :-1], packed.input_mask[:, :-1])[0]
    logits = torch.stack([model.logits(hidden, level) for level in range(len(layout.heads))], dim=1)
    first_ids = torch.tensor([head.first_id for head in layout.heads])
    is_coded = grid.packed.loss_mask[0, 1:]
    return (packed.ids[0, 1:] - first_ids)[is_coded], _weights(logits[is_coded])


def _weights(logits: Tensor) -> Tensor:
    """Convert logits `[n, v]` to whole numbers `[n, v]` float64 in proportion to the probabilities."""
    if not logits.isfinite().all():
        raise ValueError("the logits of the entropy model are not finite: its weights are damaged; train it again")
    steps = (logits * _STEPS_PER_NAT).round()
    return _WEIGHTS[(steps.amax(dim=-1, keepdim=True) - steps).clamp(max=len(_WEIGHTS) - 1).long()]


def _checksum(codes: Tensor) -> int:
    """CRC-32 of codes."""
    return zlib.crc32(codes.numpy().astype("<i4").tobytes())
