"""Options of commands that use a pretrained codec, semantic tokenizer or MuLaN."""

from dataclasses import dataclass
from typing import Any

from musiclm_pytorch.cli.checks import ModelOptions

__all__ = ["PartOptions"]


@dataclass(frozen=True, kw_only=True)
class PartOptions(ModelOptions):
    """Options that name pretrained parts."""

    codec: str | None = None
    """Use this codec instead of training one: codec_16khz (bundled), a folder, or a hub id."""
    semantic_tokenizer: str | None = None
    """Use this semantic tokenizer instead of training one: semantic_16khz (bundled), a folder, or a hub id."""
    mulan: str | None = None
    """Use this MuLaN or CLAP instead of training one: tiny (bundled), a folder, or a hub id."""

    def pretrained_parts(self) -> dict[str, Any]:
        """Load the named parts, by the names of the steps of the training pipeline that they replace."""
        from audiolm_pytorch.codecs.base import Codec
        from audiolm_pytorch.semantic.base import SemanticTokenizer
        from musiclm_pytorch.mulan.joint import JointEmbedding

        parts: dict[str, Any] = {}
        if self.codec is not None:
            parts["codec"] = Codec.from_pretrained(**self.source_of(self.codec))
        if self.semantic_tokenizer is not None:
            parts["semantic-tokenizer"] = SemanticTokenizer.from_pretrained(**self.source_of(self.semantic_tokenizer))
        if self.mulan is not None:
            parts["mulan"] = JointEmbedding.from_pretrained(**self.source_of(self.mulan))
        return parts
