"""Text encoders of transformers (T5, BERT, RoBERTa and their kin): from published files to states of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from beartype import beartype
from torch import Tensor, nn

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer, ids_of
from audiolm_pytorch.saving.fingerprint import nameless_fingerprint
from audiolm_pytorch.saving.hub import (
    LoadedModel,
    load_model,
    load_tokenizer,
    model_settings,
    portable_origin,
    require_transformers,
)

__all__ = ["PublishedText", "PublishedTextEncoder", "tokenizer_of"]

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
_UNLIMITED = 2**31


Encoder = TypeVar("Encoder", bound="PublishedTextEncoder")


class PublishedText:
    """What a text model of transformers reads: its tokenizer, and how ids with -1 past the end go in.

    Args:
        model: The model that reads ids.
        tokenizer: Its tokenizer.
        max_tokens: Most tokens of a text; None = all that the model has positions for, at most 512.

    Raises:
        ValueError: If the tokenizer is another model's, or the model has fewer positions.
    """

    def __init__(self, model: Any, tokenizer: TextTokenizer, max_tokens: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.num_tokens: int = model.get_input_embeddings().num_embeddings
        if tokenizer.vocab_size > self.num_tokens:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {self.num_tokens}: they are not of "
                "one model"
            )
        positions = _num_positions(model)
        if max_tokens is None:
            max_tokens = min(_DEFAULT_MAX_TOKENS, positions)
        fewest = tokenizer.num_special_tokens + 1
        if not fewest <= max_tokens <= positions:
            span = f"{fewest} or more" if positions == _UNLIMITED else f"in {fewest}..{positions}"
            raise ValueError(f"the most tokens of a text must be {span} for this model, got {max_tokens}")
        self.max_tokens = max_tokens

    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts with their special tokens, -1 past the end; ids given are checked."""
        return ids_of(texts, self.tokenizer, self.num_tokens, self.max_tokens)

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's `forward` for ids `[b, t]` with -1 past the end of a text."""
        # any id will do behind a text: the mask hides it, and positions are counted from the front
        return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()}


class PublishedTextEncoder(nn.Module):
    """A published text encoder and its tokenizer, saved and named as one; what comes out is up to who inherits.

    Reads the encoders of T5 (arXiv:1910.10683), mT5 and UMT5, BERT (arXiv:1810.04805), RoBERTa and XLM-RoBERTa,
    CamemBERT, DistilBERT, ALBERT, ELECTRA, DeBERTa v2 and v3, MPNet and ModernBERT in the format of transformers. The
    pooling layer that some models have behind their first token is thrown away.

    Args:
        source: Folder in transformers' format, hub id, or a model that is loaded already (it is taken over).
        tokenizer: The model's tokenizer; None = the one beside the weights in `source`.
        max_tokens: Most tokens of a text that are read, special ones included; None = all that the model has positions
            for, at most 512.
        offline: Whether to keep off the network: a hub id is then served from the local cache or refused.
        revision: Branch, tag or commit of the hub.
        cache_dir: Where downloads are kept; Hugging Face's own cache if not given.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the source is missing, of an architecture that is not read here, not in safetensors, incomplete,
            or without a tokenizer; or if the tokenizer or `max_tokens` does not fit the model.
    """

    def __init__(
        self,
        source: str | Path | LoadedModel,
        tokenizer: TextTokenizer | None,
        max_tokens: int | None,
        *,
        offline: bool,
        revision: str | None,
        cache_dir: str | Path | None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"offline": offline, "revision": revision, "cache_dir": cache_dir}
        loaded = source
        if not isinstance(loaded, LoadedModel):
            # a model that was trained to fill in words has no pooling layer in its file
            loaded = load_model(loaded, _CLASSES, unneeded=("pooler.",), **where)
        settings: Any = loaded.model.config
        self.model_type: str = settings.model_type
        if self.model_type not in _CLASSES:
            raise ValueError(f"models of type {self.model_type!r} cannot be read; these can: {sorted(_CLASSES)}")
        tokenizer = tokenizer_of(loaded, source, tokenizer, **where)
        self.origin = loaded.origin
        self.model: Any = _without_pooler(loaded.model)
        self._text = PublishedText(self.model, tokenizer, max_tokens)
        self.dim: int = settings.hidden_size
        self.depth: int = settings.num_hidden_layers

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the constructor besides the model and its tokenizer, JSON-able."""
        return {"max_tokens": self._text.max_tokens}

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able description from which `from_config` rebuilds this encoder, tokenizer and all."""
        return {
            "model": model_settings(self.model),
            "tokenizer": self._text.tokenizer.to_json(),
            "special_tokens": self._text.tokenizer.special_tokens,
            "options": self.options,
            "origin": portable_origin(self.origin),
        }

    @classmethod
    def from_config(cls: type[Encoder], config: dict[str, Any]) -> Encoder:
        """Build from the dictionary that `config` holds, with fresh weights (for `audiolm_pytorch.saving.modules`)."""
        model_class = getattr(require_transformers(), _CLASSES[config["model"]["model_type"]])
        model = model_class(model_class.config_class.from_dict(dict(config["model"])))
        tokenizer = TextTokenizer.from_json(config["tokenizer"], special_tokens=config.get("special_tokens", True))
        loaded: Any = LoadedModel(model, **config["origin"])
        return cls(loaded, tokenizer=tokenizer, **config["options"])

    def fingerprint(self) -> str:
        """Hash of all that embeddings depend on: the same on any device and from any file of the same model."""
        settings = {name: getattr(self.model.config, name, None) for name in _SETTINGS}
        tokenizer = self._text.tokenizer
        facts = [self.model_type, self._text.max_tokens, tokenizer.to_json(), settings]
        if not tokenizer.special_tokens:
            facts.append("no special tokens")
        return nameless_fingerprint(self.model, facts)

    @beartype
    def tokenize(self, texts: str | Sequence[str] | Tensor) -> Tensor:
        """Give the ids `[b, t]` int64 of texts with their special tokens, -1 past the end of each.

        Args:
            texts: One text, several, or ids `[b, t]`, which are checked and passed on.

        Raises:
            ValueError: If a text is empty, or ids are out of range, longer than the model reads, or all padding.
        """
        return self._text.tokenize(texts)


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
    return int(getattr(model.config, "max_position_embeddings", None) or _UNLIMITED)
