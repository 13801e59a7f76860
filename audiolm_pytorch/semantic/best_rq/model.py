"""BEST-RQ: a self-supervised encoder that predicts randomly projected, quantized mel frames (arXiv:2202.01855)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.checks.tracing import is_traced, split_rows
from audiolm_pytorch.checks.types import keep_arguments, typed
from audiolm_pytorch.nn.module_state import check_positive
from audiolm_pytorch.nn.transformer import build_encoder
from audiolm_pytorch.saving.construction import preserve_rng
from audiolm_pytorch.saving.modules import constructor_arguments, register
from audiolm_pytorch.semantic.base import FrameEncoder
from audiolm_pytorch.semantic.best_rq.frontend import StackedLogMel
from audiolm_pytorch.semantic.best_rq.targets import TokenTargets, sample_span_mask

__all__ = ["BestRQ", "BestRQEncoder", "MaskedPrediction"]

# Windows of long recordings that are encoded in one batch: by default six minutes, which need a few hundred MB.
_WINDOWS_PER_BATCH = 64


@register
class BestRQEncoder(FrameEncoder):
    """Encoder with a log-mel front end and a bidirectional transformer; by default a token covers 40 ms (25 Hz).

    Long waves are encoded in windows at fixed positions. With windows, the computation per second of audio does not
    depend on the length of the wave, and attention covers about as many tokens as in training.

    A window returns `window_tokens` tokens (6 s by default), about the length of a training crop. Attention also uses
    `context_tokens` tokens on each side of a window.
    """

    @typed
    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        dim_head: int = 64,
        ff_mult: int = 4,
        dropout: float = 0.0,
        sample_hz: int = 16_000,
        num_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 160,
        frames_per_token: int = 4,
        window_tokens: int = 150,
        context_tokens: int = 25,
    ) -> None:
        self.config = constructor_arguments(locals())
        super().__init__()
        check_positive(dim=dim)
        if window_tokens < 1 or context_tokens < 0:
            raise ValueError(f"window_tokens {window_tokens} must be >= 1 and context_tokens {context_tokens} >= 0")
        self.dim, self.depth, self.sample_hz = dim, depth, sample_hz
        self.window_tokens, self.context_tokens = window_tokens, context_tokens
        mel: dict[str, Any] = dict(sample_hz=sample_hz, num_mels=num_mels, n_fft=n_fft, hop_length=hop_length)
        self.front_end = StackedLogMel(**mel, frames_per_token=frames_per_token)
        self.downsample_factor = self.front_end.downsample_factor
        self.to_tokens = nn.Linear(self.front_end.dim, dim)
        self.transformer = build_encoder(dim, depth, heads, dim_head, ff_mult, dropout)
        keep_arguments(self, self.config)

    def num_frames(self, num_samples: int) -> int:
        """Return the number of tokens, `ceil(num_samples / downsample_factor)`."""
        return self.front_end.num_frames(num_samples)

    def encode(self, frames: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
        """Run the transformer on front-end vectors `[b, t, front_end.dim]`; the mask `[b, t]` is True at real tokens.

        Return the output `[b, t, d]` of transformer layer number `layer`; None means all layers and the final norm.
        """
        # The front end computes in float32, also if the weights have half precision.
        tokens = self.to_tokens(frames.to(self.to_tokens.weight.dtype))
        return self.transformer.hidden_states(tokens, mask, layers=(layer,))[0]

    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Compute the hidden states of a layer; `layer` None means the last layer with the final norm."""
        frames, mask = self.front_end(wave, lengths)
        if not is_traced() and frames.shape[1] <= self.window_tokens:
            return self.encode(frames, mask, layer), mask
        return self._encode_windows(frames, mask, layer), mask

    def _encode_windows(self, frames: Tensor, mask: Tensor, layer: int | None) -> Tensor:
        """Run `encode` in windows, whose positions count from the start of an item."""
        num_items, num_tokens, _ = frames.shape
        keep, context = self.window_tokens, self.context_tokens
        spare = keep if is_traced() else 0  # torch.export would make the number of windows a constant if it were 1
        sides = (context, -num_tokens % keep + context + spare)
        masks = rearrange(F.pad(mask, sides).unfold(1, keep + 2 * context, keep), "b w s -> (b w) s")
        windows = F.pad(frames, (0, 0, *sides)).unfold(1, keep + 2 * context, keep)
        windows = rearrange(windows, "b w d s -> (b w) s d")
        # Windows past the end of an item hold no real token and are skipped, except in traced code.
        needed = slice(None) if is_traced() else masks[:, context : context + keep].any(dim=1)
        batches = zip(*(split_rows(part[needed], _WINDOWS_PER_BATCH) for part in (windows, masks)))
        encoded = torch.cat([self.encode(part, real, layer)[:, context : context + keep] for part, real in batches])
        features = encoded.new_zeros(masks.shape[0], keep, encoded.shape[-1])
        features[needed] = encoded
        return rearrange(features, "(b w) s d -> b (w s) d", b=num_items)[:, :num_tokens]

    def truncated(self, layer: int) -> "BestRQEncoder":
        """Return an independent copy of the encoder with the first `layer` layers (at least one layer)."""
        self.check_layer(layer)
        with preserve_rng():  # weights of this encoder replace the random ones
            short = type(self)(**{**self.config, "depth": max(1, layer)})
        kept = short.state_dict().keys()
        short.load_state_dict({key: value for key, value in self.state_dict().items() if key in kept})
        return short.to(self.to_tokens.weight.device).train(self.training)


class MaskedPrediction(NamedTuple):
    """Scalar results of a training step of BEST-RQ, and the mask `hidden [b, t]` (True where noise replaced a token).

    Attributes:
        loss: Mean cross-entropy (nats) at hidden tokens, plus `seen_weight` times that at the other tokens.
        accuracy: Share of correct predictions at hidden tokens; random guesses reach 1 / codebook_size.
        majority: Accuracy at hidden tokens if the most frequent target is always predicted.
    """

    loss: Tensor
    accuracy: Tensor
    majority: Tensor
    hidden: Tensor


class BestRQ(nn.Module):
    """Training objective of BEST-RQ, masked prediction of frozen random targets (arXiv:2202.01855, section 3).

    Noise replaces random spans of the front end's vectors, and the encoder predicts the codes of these vectors.

    Three defaults of `BestRQ` differ from the paper, which is about speech recognition; the recipe of the bundled
    tokenizer explains them with measurements. Targets are computed from decorrelated frames, because without
    decorrelation targets describe mostly loudness. A target describes a token and its neighbours; with targets of
    single tokens, the encoder learns no better features than mel frames. As in HuBERT (arXiv:2106.07447, section II-B),
    codes of tokens without noise are predicted too; this loss has the weight `seen_weight`.

    A span of noise starts at each token with probability `start_prob`; `noise_std` is the noise's standard deviation.
    """

    @typed
    def __init__(
        self,
        encoder: BestRQEncoder,
        *,
        codebook_size: int = 64,
        codebook_dim: int = 16,
        num_targets: int = 64,
        reach_tokens: int = 4,
        num_directions: int | None = 192,
        seen_weight: float = 1.0,
        start_prob: float = 0.15,
        span_tokens: int = 4,
        noise_std: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= start_prob <= 1 or span_tokens < 1 or noise_std < 0 or seen_weight < 0:
            raise ValueError(
                f"start_prob {start_prob} must be in 0..1, span_tokens {span_tokens} at least 1, "
                f"noise_std {noise_std} and seen_weight {seen_weight} at least 0"
            )
        self.encoder = encoder
        self.codebook_size, self.num_targets = codebook_size, num_targets
        self.seen_weight = seen_weight
        self.start_prob, self.span_tokens, self.noise_std = start_prob, span_tokens, noise_std
        sizes: dict[str, Any] = dict(codebook_dim=codebook_dim, num_targets=num_targets, num_directions=num_directions)
        self.targets = TokenTargets(encoder.front_end.dim, codebook_size, reach_tokens=reach_tokens, seed=seed, **sizes)
        self.to_logits = nn.Linear(encoder.dim, num_targets * codebook_size)

    def forward(
        self, wave: Tensor, lengths: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskedPrediction:
        """Replace random spans of tokens by noise, and compute the loss and the accuracy of the predicted codes.

        `wave` and `lengths` are those of `FrameEncoder.features`; the generator (on the CPU) draws masks and noise.
        """
        frames, valid = self.encoder.front_end(wave, lengths)
        hidden = sample_span_mask(valid, self.start_prob, self.span_tokens, generator)
        noise = torch.randn(frames.shape, generator=generator).to(frames) * self.noise_std
        features = self.encoder.encode(torch.where(rearrange(hidden, "b t -> b t 1"), noise, frames), valid)
        loss, predicted, targets = self._predict(features, frames, hidden)
        visible = valid & ~hidden
        if self.seen_weight and visible.any():
            loss = loss + self.seen_weight * self._predict(features, frames, visible)[0]
        most_frequent = torch.stack([column.bincount().max() for column in targets.unbind(dim=1)])
        accuracy = (predicted == targets).float().mean()
        return MaskedPrediction(loss, accuracy, most_frequent.float().mean() / len(targets), hidden)

    def _predict(self, features: Tensor, frames: Tensor, selected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (nats), predicted and target codes `[m, q]` (m tokens with `selected` True, q codebooks)."""
        targets = self.targets(frames, selected)
        logits = rearrange(self.to_logits(features[selected]), "m (q v) -> m q v", q=self.num_targets)
        loss = F.cross_entropy(rearrange(logits.float(), "m q v -> (m q) v"), rearrange(targets, "m q -> (m q)"))
        return loss, logits.detach().argmax(dim=-1), targets
