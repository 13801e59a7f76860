"""Small fakes of a codec, a semantic tokenizer and conditioners, with tiny stages for them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.conditioning.base import Conditioner, Conditions, ConditionTensor, TextEncoder
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.lm.token_model import TokenTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from audiolm_pytorch.tokens.streams import PackedTokens

SAMPLE_HZ = 800
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "ff_mult": 2.0}
CONDITION = {"audio_text_condition": True, "cond_dim": 8}


class FakeCodec(Codec):
    """50 frames per second of 4 levels, the digits of the mean loudness of a frame in base 16."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = SAMPLE_HZ, 16, 1, 4, 16

    def fingerprint(self) -> str:
        return "codec"

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        wave = wave[:, 0] if wave.ndim == 3 else wave
        frames = nn.functional.pad(wave, (0, -wave.shape[-1] % self.downsample_factor)).unfold(-1, 16, 16)
        loudness = (frames.abs().mean(-1).clamp(max=0.999) * 16**4).long()
        return torch.stack([loudness // 16 ** (3 - level) % 16 for level in range(4)], dim=-1)

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        weights = torch.tensor([16.0 ** -(level + 1) for level in range(codes.shape[-1])])
        wave = (codes * weights).sum(-1).repeat_interleave(self.downsample_factor, dim=-1)
        return wave[:, None, :num_samples]


class FakeSemanticTokenizer(SemanticTokenizer):
    """25 tokens per second, the loudness of 32 samples in 12 steps; it may lose frames at the end, like HuBERT."""

    target_sample_hz, downsample_factor, codebook_size = SAMPLE_HZ, 32, 12

    def __init__(self, lost_frames: int = 0) -> None:
        super().__init__()
        self.lost_frames = lost_frames

    def fingerprint(self) -> str:
        return "semantic"

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // self.downsample_factor) - self.lost_frames

    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        frames = nn.functional.pad(wave, (0, -wave.shape[-1] % self.downsample_factor)).unfold(-1, 32, 32)
        ids = (frames.abs().mean(-1).clamp(max=0.999) * 12).long()[:, : self.num_frames(wave.shape[-1])]
        if lengths is None:
            return ids
        counts = torch.tensor([self.num_frames(n) for n in lengths.tolist()])
        return ids.masked_fill(torch.arange(ids.shape[1]) >= counts[:, None], -1)


class FakeConditioner(Conditioner):
    """Three codes per text (its length), wave (its loudness) or latent. `asked` lists the namespaces of its calls."""

    sample_hz = SAMPLE_HZ

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        names = ("semantic", "coarse", "fine")
        self.tables = nn.ModuleDict({name: nn.Embedding(3 * 10, dim) for name in names})
        self.asked: list[str] = []

    def table(self, namespace: str) -> nn.Module:
        return self.tables[namespace]

    def dim(self, namespace: str) -> int:
        return self.tables[namespace].embedding_dim

    def codes(self, *, texts=None, wavs=None, lengths=None) -> Tensor:
        if texts is not None:
            return self.codes_from_latents(torch.tensor([[len(text) / 1000] for text in texts]), "text")
        return self.codes_from_latents(wavs.abs().mean(-1, keepdim=True))

    def codes_from_latents(self, latents: Tensor, modality: str = "audio") -> Tensor:
        return (latents[:, :1].abs() * 1000).long() // torch.tensor([1, 10, 100]) % 10

    def conditioning(self, *, texts=None, wavs=None, codes=None, lengths=None, namespace: str) -> ConditionTensor:
        self.asked.append(namespace)
        if sum(one is not None for one in (texts, wavs, codes)) != 1:
            raise ValueError("pass exactly one of texts, wavs and codes")
        if codes is None:
            codes = self.codes(texts=texts, wavs=wavs, lengths=lengths)
        embeddings = self.tables[namespace](codes + torch.tensor([0, 10, 20]))
        return ConditionTensor(embeddings, torch.ones(codes.shape, dtype=torch.bool))


class FakeTextConditioner(TextEncoder):
    """One state of width 6 per letter: the letter's number, and in the last dimension the length of the text."""

    dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[str]] = []

    def fingerprint(self) -> str:
        return "text encoder"

    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(texts):
            raise ValueError("an empty text has no states")
        self.asked.append(texts)
        longest = max(len(text) for text in texts)
        states = torch.zeros(len(texts), longest, self.dim)
        for state, text in zip(states, texts):
            state[: len(text)] = torch.tensor([ord(letter) % 10 / 10 for letter in text])[:, None]
            state[: len(text), -1] = len(text) / 10
        return ConditionTensor(states, torch.arange(longest) < torch.tensor([[len(text)] for text in texts]))


def tiny_stages(lookahead_seconds: float = 0.0, **changes: object) -> dict[str, TokenTransformer]:
    """The three stages for the fakes."""
    sizes = {**SIZES, **changes}
    return {
        "semantic": SemanticTransformer(num_semantic_tokens=12, **sizes),
        "coarse": CoarseTransformer(
            num_semantic_tokens=12,
            codebook_size=16,
            num_coarse_quantizers=2,
            semantic_lookahead_seconds=lookahead_seconds,
            **sizes,
        ),
        "fine": FineTransformer(num_coarse_quantizers=2, num_fine_quantizers=2, codebook_size=16, **sizes),
    }


def random_conditions(batch: int, levels: int = 3, dim: int = 8) -> Conditions:
    """Random conditions."""
    return {"codes": ConditionTensor.of(torch.randn(batch, levels, dim))}


def select(conditions: Conditions | None, items: Tensor) -> Conditions | None:
    """Select items of all conditions."""
    return None if conditions is None else {name: condition.select(items) for name, condition in conditions.items()}


def memorise(
    model: TokenTransformer,
    packed: PackedTokens,
    conditioning: Conditions | None = None,
    steps: int = 300,
    floor: float = 0.0,
) -> float:
    """Train until the loss is at most 0.01 above `floor` (nats per token), and return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(packed, conditioning).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < floor + 0.01:
            break
    model.eval()
    return loss.item()
