"""Published text encoders of transformers (T5, BERT, RoBERTa and their kin) as MuLaN's text tower."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.devices import device_of
from audiolm_pytorch.hub import (
    LoadedModel,
    load_model,
    load_tokenizer,
    model_settings,
    nameless_fingerprint,
    portable_origin,
    require_transformers,
)
from audiolm_pytorch.io import register
from musiclm_pytorch.mulan.pooling import token_means
from musiclm_pytorch.mulan.tokenizer import TextTokenizer, ids_of

__all__ = ["PublishedText", "TransformersTextEncoder"]

_CLASSES = {
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
# Settings that change embeddings without showing in the shape of any weight.
_SETTINGS = (
    "activation",
    "feed_forward_proj",
    "global_attn_every_n_layers",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "local_attention",
    "max_relative_positions",
    "norm_eps",
    "num_attention_heads",
    "pad_token_id",
    "pos_att_type",
    "position_buckets",
    "relative_attention_max_distance",
    "rope_parameters",
)
# As MuLan's BERT (arXiv:2208.12415, sec. 3.2); models with relative positions know no limit of their own.
_DEFAULT_MAX_TOKENS = 512


class PublishedText:
    """What a text model of transformers reads: its tokenizer, and how ids with -1 past the end go in.

    Args:
        model: The model that reads ids.
        tokenizer: Its tokenizer.
        max_seq_len: Most tokens of a text; None = all that the model has positions for, at most 512.

    Raises:
        ValueError: If the tokenizer is another model's, or the model has fewer positions.
    """

    def __init__(self, model: Any, tokenizer: TextTokenizer, max_seq_len: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.num_tokens: int = model.get_input_embeddings().num_embeddings
        if tokenizer.vocab_size > self.num_tokens:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {self.num_tokens}: they are not of "
                "one model"
            )
        positions = _num_positions(model)
        if max_seq_len is None:
            max_seq_len = min(_DEFAULT_MAX_TOKENS, positions)
        if not tokenizer.num_special_tokens < max_seq_len <= positions:
            raise ValueError(
                f"max_seq_len must be in {tokenizer.num_special_tokens + 1}..{positions} tokens for this model, "
                f"got {max_seq_len}"
            )
        self.max_seq_len = max_seq_len

    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts with their special tokens, -1 past the end; ids given are checked."""
        return ids_of(texts, self.tokenizer, self.num_tokens, self.max_seq_len)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's `forward` for ids `[b, t]` with -1 past the end of a text."""
        # any id will do behind a text: the mask hides it, and positions are counted from the front
        return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}


@register
class TransformersTextEncoder(nn.Module):
    """One embedding per text: the mean of a published encoder's outputs over the tokens of the text.

    Reads the encoders of T5 (arXiv:1910.10683), mT5 and UMT5, BERT (arXiv:1810.04805), RoBERTa and XLM-RoBERTa,
    CamemBERT, DistilBERT, ALBERT, ELECTRA, DeBERTa v2 and v3, MPNet and ModernBERT in the format of transformers.
    Special tokens count as tokens of the text, as in sentence encoders that pool by the mean. The pooling layer that
    some models have behind their first token is thrown away.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already (it is taken over).
        tokenizer: The model's tokenizer; None = the one beside the weights in `source`.
        frozen: Whether the weights stay as they are: always in eval mode, without gradients. Otherwise they are
            fine-tuned with the rest of the MuLaN, with the dropout that the model's own settings name.
        max_seq_len: Most tokens of a text that are read, special ones included; the rest is cut off with a warning.
            None = all that the model has positions for, at most 512.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of an architecture that is not read here, not in safetensors, incomplete,
            or without a tokenizer; or if the tokenizer or `max_seq_len` does not fit the model.
    """

    @beartype
    def __init__(
        self,
        source: str | Path | LoadedModel,
        *,
        tokenizer: TextTokenizer | None = None,
        frozen: bool = True,
        max_seq_len: int | None = None,
        offline: bool = False,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        loaded, tokenizer = _opened(source, tokenizer, offline=offline, revision=revision, cache_dir=cache_dir)
        self.origin = loaded.origin
        self.model: Any = _without_pooler(loaded.model)
        settings: Any = loaded.model.config
        self.model_type: str = settings.model_type
        if self.model_type not in _CLASSES:
            raise ValueError(f"models of type {self.model_type!r} cannot be read; these can: {sorted(_CLASSES)}")
        self._text = PublishedText(self.model, tokenizer, max_seq_len)
        self.dim: int = settings.hidden_size
        self.depth: int = settings.num_hidden_layers
        self.frozen = frozen
        self.model.requires_grad_(not frozen)
        self.train(not frozen)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this encoder, tokenizer and all."""
        return {
            "model": model_settings(self.model),
            "tokenizer": self._text.tokenizer.to_json(),
            "options": {"frozen": self.frozen, "max_seq_len": self._text.max_seq_len},
            "origin": portable_origin(self.origin),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TransformersTextEncoder":
        """Build from the dictionary that `config` holds, with fresh weights (for `audiolm_pytorch.io`)."""
        model_class = getattr(require_transformers(), _CLASSES[config["model"]["model_type"]])
        model = model_class(model_class.config_class.from_dict(dict(config["model"])))
        tokenizer = TextTokenizer.from_json(config["tokenizer"], special_tokens=True)
        return cls(LoadedModel(model, **config["origin"]), tokenizer=tokenizer, **config["options"])

    @property
    def fingerprint(self) -> str:
        """Hash of all that embeddings depend on: the same on any device and from any file of the same model."""
        settings = {name: getattr(self.model.config, name, None) for name in _SETTINGS}
        facts = [self.model_type, self._text.max_seq_len, self._text.tokenizer.to_json(), settings]
        return nameless_fingerprint(self.model, facts)

    def train(self, mode: bool = True) -> "TransformersTextEncoder":
        """Switch to training mode, unless frozen: dropout would change embeddings that nothing can adapt to."""
        return super().train(mode and not self.frozen)

    @beartype
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts with their special tokens, -1 past the end of each.

        Args:
            texts: One text, several, or ids `[b, t]`, which are checked and passed on.

        Raises:
            ValueError: If a text is empty, or ids are out of range, longer than the model reads, or all padding.
        """
        return self._text.tokenize(texts)

    def forward(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Embed texts.

        Args:
            texts: One text, several, or ids `[b, t]` (see `tokenize`).

        Returns:
            Tensor `[b, dim]` float32, not normalised; each row is the same whatever else is in the batch.
        """
        return self.embed_layers(texts, layers=(self.depth,))[0]

    @beartype
    def embed_layers(self, texts: str | Sequence[str] | Tensor, *, layers: Sequence[int]) -> Tensor:
        """Embed texts by what stands after some of the blocks.

        Args:
            texts: As for `forward`.
            layers: Numbers of blocks, 0..depth, 0 = what goes into the first; `depth` = the output of the model, with
                the norm that some have behind their last block.

        Returns:
            Tensor `[l, b, dim]` float32: means over the tokens, not normalised.

        Raises:
            ValueError: As `tokenize`, or if a layer is not there.
        """
        if not all(0 <= layer <= self.depth for layer in layers):
            raise ValueError(f"layers must be in 0..{self.depth}, got {tuple(layers)}")
        ids = self.tokenize(texts).to(device_of(self.model))
        inner = any(layer < self.depth for layer in layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.model(**self._text.inputs(ids), output_hidden_states=inner)
            states = {self.depth: out.last_hidden_state}
            if inner:
                states = {**dict(enumerate(out.hidden_states)), **states}
            return token_means([states[layer] for layer in layers], ids >= 0)


def _opened(
    source: str | Path | LoadedModel, tokenizer: TextTokenizer | None, **where: Any
) -> tuple[LoadedModel, TextTokenizer]:
    """The model and its tokenizer, from wherever they are."""
    # a model that was trained to fill in words has no pooling layer in its file
    loaded = source if isinstance(source, LoadedModel) else load_model(source, _CLASSES, unneeded=("pooler.",), **where)
    return loaded, tokenizer_of(loaded, source, tokenizer, **where)


def tokenizer_of(
    loaded: LoadedModel, source: str | Path | LoadedModel, tokenizer: TextTokenizer | None, **where: Any
) -> TextTokenizer:
    """The tokenizer that was given, or the one beside the weights, of the same commit.

    Raises:
        ValueError: If there is neither.
    """
    if tokenizer is not None:
        return tokenizer
    if isinstance(source, LoadedModel):
        raise ValueError("a model that is loaded already brings no tokenizer: give it as tokenizer=")
    where["revision"] = loaded.revision or where["revision"]
    return TextTokenizer(load_tokenizer(source, **where), special_tokens=True)


def _without_pooler(model: Any) -> Any:
    """The model itself, rid of the layer behind its first token, which no embedding here comes from."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _num_positions(model: nn.Module) -> int:
    """Tokens that a model has positions for; those with relative positions alone name no limit."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # RoBERTa and its kin count from behind the padding's own place
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)
