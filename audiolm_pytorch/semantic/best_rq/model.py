"""BEST-RQ: a self-supervised encoder that predicts randomly projected, quantized mel frames (arXiv:2202.01855)."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from einops import rearrange
from torch import Tensor, nn

from audiolm_pytorch.nn.encoder import TransformerEncoder
from audiolm_pytorch.saving.modules import register
from audiolm_pytorch.semantic.best_rq.frontend import StackedLogMel
from audiolm_pytorch.semantic.best_rq.targets import TokenTargets, sample_span_mask

__all__ = ["BestRQ", "BestRQEncoder", "MaskedPrediction"]

# Windows of long recordings that are encoded at once: six minutes by default, in a few hundred MB.
_MOST_WINDOWS = 64


@register
class BestRQEncoder(nn.Module):
    """Log-mel tokens through a bidirectional transformer; a `FrameEncoder`. One token covers 40 ms by default (25 Hz).

    Features of long waves are computed in windows that stand at fixed places: attention then costs no more per second
    than in short waves, and never reaches further than it did in training.

    Args:
        dim: Width of the transformer.
        depth: Blocks.
        heads: Attention heads.
        dim_head: Width of a head.
        ff_mult: Inner width of the feed-forward over `dim`.
        dropout: Dropout of the blocks in training.
        sample_hz: Rate of the waves (Hz).
        num_mels: Mel bands.
        n_fft: Samples of the analysis window.
        hop_length: Samples between mel frames (10 ms by default).
        frames_per_token: Mel frames stacked into a token.
        window_tokens: Tokens that one window is responsible for (6 s by default); about a training crop.
        context_tokens: Tokens that a window sees on each side of them.

    Raises:
        ValueError: If a number is out of range.
    """

    @beartype
    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        dim_head: int = 64,
        ff_mult: int = 4,
        dropout: float | int = 0.0,
        sample_hz: int = 16_000,
        num_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 160,
        frames_per_token: int = 4,
        window_tokens: int = 150,
        context_tokens: int = 25,
    ) -> None:
        super().__init__()
        if window_tokens < 1 or context_tokens < 0:
            raise ValueError(f"need window_tokens >= 1 and context_tokens >= 0, got {window_tokens}, {context_tokens}")
        front = {
            "sample_hz": sample_hz,
            "num_mels": num_mels,
            "n_fft": n_fft,
            "hop_length": hop_length,
            "frames_per_token": frames_per_token,
        }
        body = {
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "dim_head": dim_head,
            "ff_mult": ff_mult,
            "dropout": dropout,
        }
        reach = {"window_tokens": window_tokens, "context_tokens": context_tokens}
        self.config: dict[str, Any] = {**body, **front, **reach}
        self.window_tokens = window_tokens
        self.context_tokens = context_tokens
        self.front_end = StackedLogMel(**front)
        self.to_tokens = nn.Linear(self.front_end.dim, dim)
        self.transformer = TransformerEncoder(dim, depth, heads, dim_head=dim_head, ff_mult=ff_mult, dropout=dropout)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BestRQEncoder":
        """Build an untrained encoder from the numbers in `config`."""
        return cls(**config)

    @property
    def sample_hz(self) -> int:
        """Rate of the waves (Hz)."""
        return self.front_end.sample_hz

    @property
    def downsample_factor(self) -> int:
        """Samples per token."""
        return self.front_end.downsample_factor

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.transformer.dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.transformer.depth

    def num_frames(self, num_samples: int) -> int:
        """Tokens of a wave of that many samples, `ceil(num_samples / downsample_factor)`; see `StackedLogMel`."""
        return self.front_end.num_frames(num_samples)

    def encode(self, frames: Tensor, mask: Tensor, layer: int | None = None) -> Tensor:
        """Run the transformer over vectors of the front end.

        Args:
            frames: `[b, t, front_end.dim]`.
            mask: `[b, t]` bool, True where a token is real.
            layer: Blocks to run, 0..depth (0 = the tokens alone); None = all, with the final norm.

        Returns:
            Features `[b, t, d]`.
        """
        # the front end computes in float32 also where the weights are of half precision
        tokens = self.to_tokens(frames.to(self.to_tokens.weight.dtype))
        return self.transformer.hidden_states(tokens, mask, layers=(layer,))[0]

    def features(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of a layer.

        Args:
            wave: `[b, n]`, float, at `sample_hz`.
            lengths: `[b]` int, samples that belong to each item; None = all.
            layer: 0..depth; None = the output of the whole stack.

        Returns:
            Features `[b, t, d]` and the mask `[b, t]` bool of real tokens. Padding changes nothing at real tokens.

        Raises:
            ValueError: If shapes do not fit, an item is shorter than one token or there is no such layer.
        """
        frames, mask = self.front_end(wave, lengths)
        if frames.shape[1] <= self.window_tokens:
            return self.encode(frames, mask, layer), mask
        return self._encode_windows(frames, mask, layer), mask

    def _encode_windows(self, frames: Tensor, mask: Tensor, layer: int | None) -> Tensor:
        """`encode` in windows: an item's own windows are the same alone and in a longer batch."""
        num_items, num_tokens, _ = frames.shape
        keep, context = self.window_tokens, self.context_tokens
        sides = (context, -num_tokens % keep + context)
        masks = rearrange(F.pad(mask, sides).unfold(1, keep + 2 * context, keep), "b w s -> (b w) s")
        windows = F.pad(frames, (0, 0, *sides)).unfold(1, keep + 2 * context, keep)
        windows = rearrange(windows, "b w d s -> (b w) s d")
        # Windows past an item's end hold nothing to attend to.
        needed = masks[:, context : context + keep].any(dim=1)
        batches = zip(windows[needed].split(_MOST_WINDOWS), masks[needed].split(_MOST_WINDOWS))
        encoded = torch.cat([self.encode(part, real, layer)[:, context : context + keep] for part, real in batches])
        features = encoded.new_zeros(len(masks), keep, encoded.shape[-1])
        features[needed] = encoded
        return rearrange(features, "(b w) s d -> b (w s) d", b=num_items)[:, :num_tokens]

    def forward(self, wave: Tensor, lengths: Tensor | None = None, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Same as `features`."""
        return self.features(wave, lengths, layer)

    def truncated(self, layer: int) -> "BestRQEncoder":
        """An independent copy of the first `layer` blocks, whose hidden states are those of this encoder.

        Args:
            layer: Blocks to keep, 0..depth; one is kept, and not used, for layer 0.

        Raises:
            ValueError: If there is no such layer.
        """
        if not 0 <= layer <= self.depth:
            raise ValueError(f"layer must be in 0..{self.depth}, got {layer}")
        short = type(self)(**{**self.config, "depth": max(1, layer)})
        wanted = short.state_dict().keys()
        short.load_state_dict({key: value for key, value in self.state_dict().items() if key in wanted})
        return short.to(self.to_tokens.weight.device).train(self.training)


class MaskedPrediction(NamedTuple):
    """What a step of BEST-RQ gives.

    Attributes:
        loss: Scalar, mean cross-entropy (nats) over hidden tokens and codebooks, plus the weighted one of seen tokens.
        accuracy: Scalar, share of hidden targets predicted; chance is 1 / codebook_size.
        majority: Scalar, the accuracy of always naming the commonest target of these very tokens: what to beat.
        hidden: `[b, t]` bool, the tokens that were hidden.
    """

    loss: Tensor
    accuracy: Tensor
    majority: Tensor
    hidden: Tensor


class BestRQ(nn.Module):
    """Masked prediction of frozen random targets on top of an encoder (arXiv:2202.01855, sec. 3).

    Spans of the normalised mel tokens are replaced by noise; the encoder has to name the codes of what was there.

    Three defaults differ from the paper, which recognises speech; the figures behind them stand in the recipe of the
    bundled tokenizer. Targets are taken from decorrelated frames, or they hear mostly loudness. They describe the
    surroundings of a token, or layers know a token no better than its own mel frame does. Tokens that can be seen are
    named as well, as in HuBERT (arXiv:2106.07447, sec. II-B).

    Args:
        encoder: The encoder to train.
        codebook_size: Codes per codebook, V.
        codebook_dim: Width of the random projection.
        num_targets: Codebooks predicted side by side.
        reach_tokens: Tokens on each side of a token that its targets describe, too.
        num_directions: Decorrelated directions that are left of these before the random projection; None = all, as
            they are.
        seen_weight: Weight of the loss at tokens that were not hidden.
        start_prob: Probability that a hidden span starts at a token.
        span_tokens: Length of a span.
        noise_std: Standard deviation of the noise that stands in for hidden tokens.
        seed: Seed of the frozen targets.

    Raises:
        ValueError: If a number is out of range.
    """

    @beartype
    def __init__(
        self,
        encoder: BestRQEncoder,
        *,
        codebook_size: int = 64,
        codebook_dim: int = 16,
        num_targets: int = 64,
        reach_tokens: int = 4,
        num_directions: int | None = 192,
        seen_weight: float | int = 1.0,
        start_prob: float | int = 0.15,
        span_tokens: int = 4,
        noise_std: float | int = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= start_prob <= 1 or span_tokens < 1 or noise_std < 0 or seen_weight < 0:
            raise ValueError(
                "need 0 <= start_prob <= 1, span_tokens >= 1, noise_std >= 0, seen_weight >= 0; "
                f"got {start_prob, span_tokens, noise_std, seen_weight}"
            )
        self.encoder = encoder
        self.codebook_size = codebook_size
        self.num_targets = num_targets
        self.seen_weight = seen_weight
        self.start_prob = start_prob
        self.span_tokens = span_tokens
        self.noise_std = noise_std
        self.targets = TokenTargets(
            encoder.front_end.dim,
            codebook_size,
            codebook_dim=codebook_dim,
            num_targets=num_targets,
            reach_tokens=reach_tokens,
            num_directions=num_directions,
            seed=seed,
        )
        self.to_logits = nn.Linear(encoder.dim, num_targets * codebook_size)

    def forward(
        self, wave: Tensor, lengths: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MaskedPrediction:
        """Loss and accuracy of one masked batch.

        Args:
            wave: `[b, n]`, float, at the encoder's rate.
            lengths: `[b]` int, samples that belong to each item; None = all.
            generator: CPU generator of masks and noise; None = the global one.

        Returns:
            A `MaskedPrediction`; padding does not count in it, and only hidden tokens in its accuracy.
        """
        frames, valid = self.encoder.front_end(wave, lengths)
        hidden = sample_span_mask(valid, self.start_prob, self.span_tokens, generator)
        noise = torch.randn(frames.shape, generator=generator).to(frames) * self.noise_std
        given = torch.where(rearrange(hidden, "b t -> b t 1"), noise, frames)
        features = self.encoder.encode(given, valid)
        loss, named, targets = self._named(features, frames, hidden)
        seen = valid & ~hidden
        if self.seen_weight and seen.any():
            loss = loss + self.seen_weight * self._named(features, frames, seen)[0]
        commonest = torch.stack([column.bincount().max() for column in targets.unbind(dim=1)])
        accuracy = (named == targets).float().mean()
        return MaskedPrediction(loss, accuracy, commonest.float().mean() / len(targets), hidden)

    def _named(self, features: Tensor, frames: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy (nats), the codes named `[m, q]` and the true ones `[m, q]` at the chosen tokens `[b, t]`."""
        targets = self.targets(frames, chosen)
        logits = rearrange(self.to_logits(features[chosen]), "m (q v) -> m q v", q=self.num_targets)
        loss = F.cross_entropy(rearrange(logits.float(), "m q v -> (m q) v"), rearrange(targets, "m q -> (m q)"))
        return loss, logits.detach().argmax(dim=-1), targets
