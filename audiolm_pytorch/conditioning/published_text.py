"""Published text encoders of the transformers library (T5, BERT, RoBERTa and similar), with their tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audiolm_pytorch.checks.types import typed
from audiolm_pytorch.conditioning.base import ConditionTensor, TextEncoder
from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer, ids_of
from audiolm_pytorch.nn.module_state import device_of
from audiolm_pytorch.saving import hub
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import LoadedModel
from audiolm_pytorch.saving.modules import SavedModule, register

__all__ = ["TEXT_MODELS", "PublishedText", "PublishedTextEncoder", "TextConditioner", "tokenizer_of"]

TEXT_MODELS = {
    "albert": "AlbertModel",
    "bert": "BertModel",
    "camembert": "CamembertModel",
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
    "electra": "ElectraModel",
    "modernbert": "ModernBertModel",
    "mpnet": "MPNetModel",
    "mt5": "MT5EncoderModel",
    "roberta": "RobertaModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "xlm-roberta": "XLMRobertaModel",
}
# Settings that change embeddings but not the shape of any weight; part of the fingerprint.
_SETTINGS = (
    "activation feed_forward_proj global_attn_every_n_layers hidden_act hidden_activation layer_norm_eps "
    "layer_norm_epsilon local_attention max_relative_positions norm_eps num_attention_heads pad_token_id pos_att_type "
    "position_buckets relative_attention_max_distance rope_parameters"
).split()
# As MuLan's BERT (arXiv:2208.12415, sec. 3.2); models with relative positions have no limit.
_DEFAULT_MAX_TOKENS = 512
_UNLIMITED = 2**31


class PublishedText:
    """Text input of a model of transformers: tokenizes texts, and builds the arguments of the model's `forward`.

    With `max_tokens=None`, a text has at most as many tokens as the model allows, and at most 512.
    """

    def __init__(self, model: Any, tokenizer: TextTokenizer, max_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.num_tokens: int = model.get_input_embeddings().num_embeddings
        if tokenizer.vocab_size > self.num_tokens:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model has {self.num_tokens} embeddings; pass "
                "the tokenizer of this model"
            )
        positions = _num_positions(model)
        if max_tokens is None:
            max_tokens = min(_DEFAULT_MAX_TOKENS, positions)
        fewest = tokenizer.num_special_tokens + 1
        if not fewest <= max_tokens <= positions:
            allowed = f"{fewest} or more" if positions == _UNLIMITED else f"in {fewest}..{positions}"
            raise ValueError(
                f"max_tokens (max_seq_len of a text tower) must be {allowed} for this model, got {max_tokens}"
            )
        self.max_tokens = max_tokens

    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Return token ids `[b, t]` int64 of texts, padded with -1; if `texts` are token ids, only check the ids."""
        return ids_of(texts, self.tokenizer, self.num_tokens, self.max_tokens)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the `forward` arguments of the text model for token ids `[b, t]` padded with -1."""
        # The id of padding does not matter, because padding is masked.
        return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}


class PublishedTextEncoder(SavedModule):
    """A published text encoder with its tokenizer, saved as one module. Subclasses define `forward`.

    The class loads encoders in the format of the transformers library: T5 (arXiv:1910.10683), mT5, UMT5, BERT
    (arXiv:1810.04805), RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ALBERT, ELECTRA, DeBERTa v2 and v3, MPNet and
    ModernBERT. If a model has a pooling layer on the first token, the pooling layer is removed.

    Args:
        source: Folder of a model in the format of transformers, model id on the Hugging Face hub, or loaded model.
        tokenizer: Tokenizer of the model; None = loaded from `source`.
        max_tokens: Maximum number of tokens per text, special tokens included; longer texts are truncated with a
            warning. With `max_tokens=None`, the limit is that of the model, but not more than 512.
        offline: Whether to use only local folders and the local cache of the hub, without downloads.
        allow_noncommercial: Whether to load weights with a non-commercial licence.
    """

    frozen: bool = True  # whether the weights never change

    @typed
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        max_tokens: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        allow_noncommercial: bool = False,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = dict(
            offline=offline, revision=revision, cache_dir=cache_dir, allow_noncommercial=allow_noncommercial
        )
        # Files of masked language models have no pooling layer.
        loaded = hub.load_model(source, TEXT_MODELS, unneeded=("pooler.",), **where)
        settings: Any = loaded.model.config
        self.model_type: str = settings.model_type
        tokenizer = tokenizer_of(loaded, source, tokenizer, **where)
        self.origin = loaded.origin
        self.model: Any = loaded.model.requires_grad_(False)
        if getattr(self.model, "pooler", None) is not None:
            self.model.register_module("pooler", None)
        self._text = PublishedText(self.model, tokenizer, max_tokens)
        self.dim: int = settings.hidden_size
        self.depth: int = settings.num_hidden_layers
        self.train(False)

    def train(self, mode: bool = True) -> "PublishedTextEncoder":
        """Set the training mode. A frozen encoder stays in eval mode, because dropout would change its outputs."""
        return super().train(mode and not self.frozen)

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments, except the model and the tokenizer, as JSON-compatible data."""
        return {"max_tokens": self._text.max_tokens}

    @property
    def config(self) -> dict[str, Any]:
        """JSON-compatible description of the model and the tokenizer, from which `from_config` builds an encoder."""
        return {
            "model": hub.model_settings(self.model),
            "tokenizer": self._text.tokenizer.to_json(),
            "special_tokens": self._text.tokenizer.special_tokens,
            "options": self.options,
            "origin": hub.portable_origin(self.origin),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PublishedTextEncoder":
        """Build an encoder with newly initialised weights from the value of the property `config`."""
        model = hub.model_of(config["model"], TEXT_MODELS)
        tokenizer = TextTokenizer.from_json(config["tokenizer"], special_tokens=config.get("special_tokens", True))
        return cls(LoadedModel(model, **config["origin"]), tokenizer=tokenizer, **config["options"])

    def fingerprint(self) -> str:
        """Return a hash of weights, tokenizer and settings that does not depend on the device or the file format."""
        settings = {name: getattr(self.model.config, name, None) for name in _SETTINGS}
        tokenizer = self._text.tokenizer
        facts = [self.model_type, self._text.max_tokens, tokenizer.to_json(), settings]
        if not tokenizer.special_tokens:
            facts.append("no special tokens")
        return nameless_fingerprint(self.model, facts)

    @typed
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Return token ids `[b, t]` int64 of texts, padded with -1; if `texts` are token ids, only check the ids."""
        return self._text.tokenize(texts)


@register
class TextConditioner(PublishedTextEncoder, TextEncoder):
    """Frozen text encoder whose last hidden states are conditions, as T5 in MusicGen (arXiv:2306.05284, sec. 2.3).

    The hidden states of a text do not depend on other texts in the batch, and are float32 even under autocast.
    """

    published = dict.fromkeys(TEXT_MODELS, "TextConditioner")

    @typed
    @torch.no_grad()
    def forward(self, texts: str | Sequence[str]) -> ConditionTensor:
        """Return hidden states, padded with zeros to the length of the longest text."""
        device = device_of(self.model)
        ids = self.tokenize(texts).to(device)
        mask = ids >= 0
        with torch.autocast(device.type, enabled=False):
            states = self.model(**self._text.inputs(ids)).last_hidden_state
        return ConditionTensor(states.float().masked_fill(~mask.unsqueeze(-1), 0.0), mask)


def tokenizer_of(
    loaded: LoadedModel, source: str | Path | LoadedModel, tokenizer: TextTokenizer | None, **where: Any
) -> TextTokenizer:
    """Return `tokenizer`, or, if it is None, load the tokenizer of `source` from the same commit as the weights."""
    if tokenizer is not None:
        return tokenizer
    if isinstance(source, LoadedModel):
        raise ValueError("got a loaded model without a tokenizer; pass tokenizer=TextTokenizer(...)")
    where["revision"] = loaded.revision or where["revision"]
    return TextTokenizer(hub.load_tokenizer(source, **where), special_tokens=True)


def _num_positions(model: nn.Module) -> int:
    """Return the largest number of positions in a text, or a very large number for a model with relative positions."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # RoBERTa's position numbers start after the index of the padding token
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return int(getattr(model.config, "max_position_embeddings", None) or _UNLIMITED)
