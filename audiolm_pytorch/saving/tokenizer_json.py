"""Read a tokenizer of the `tokenizers` library from JSON of unknown origin, with bounded time and memory."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from audiolm_pytorch.saving.text import one_line

__all__ = ["rust_errors", "tokenizer_of_json"]

# Types of normalizers, pre-tokenizers, post-processors and decoders of published text encoders. `Split` and `Replace`
# are allowed with a text as pattern. A regular expression can take exponential time, so that only known ones are
# allowed.
_TYPES = frozenset(
    "Lowercase NFC NFD NFKC NFKD Nmt Strip StripAccents Prepend Precompiled Replace BertNormalizer Sequence ByteLevel "
    "Whitespace WhitespaceSplit BertPreTokenizer Metaspace Digits Punctuation UnicodeScripts CharDelimiterSplit Split "
    "TemplateProcessing BertProcessing RobertaProcessing WordPiece BPEDecoder Fuse ByteFallback CTC".split()
)
_PATTERNS = frozenset([" {2,}", "\\s+", "[\\n\\r\\t]"])
_MODELS = frozenset(["BPE", "Unigram", "WordLevel", "WordPiece"])
_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_MAX_BYTES, _MAX_IDS = 2**26, 2**22


def tokenizer_of_json(text: str) -> Tokenizer:
    """Build a tokenizer from JSON; raise a ValueError of one line for JSON that can take unbounded time or memory.

    Settings for truncation and padding are not used.
    """
    advice = "pass the result of to_json, or a tokenizer.json of a published text encoder"
    if len(text) > _MAX_BYTES:
        raise ValueError(f"a tokenizer of {len(text)} letters of JSON is too large; {advice}")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the text is not a tokenizer in JSON ({one_line(error)}); {advice}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError(f"the text is not a tokenizer in JSON: it has no model; {advice}")
    faults = [*_faults_of_ids(data), *(fault for name in _PIPELINE for fault in _faults_of_types(data.get(name)))]
    if data["model"].get("type", "BPE") not in _MODELS:
        faults.append(f"the model type {data['model'].get('type')!r:.60}")
    if faults:
        raise ValueError(f"the tokenizer is refused because of {', '.join(faults[:3])}; {advice}")
    with rust_errors("the text is not a tokenizer in JSON", advice):
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _faults_of_ids(data: dict[str, Any]) -> list[str]:
    """Return a description of a token id that is not in 0..`_MAX_IDS` - 1, which would need too much memory."""
    vocab, added = data["model"].get("vocab"), data.get("added_tokens") or []
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") if isinstance(token, dict) else None for token in added] if isinstance(added, list) else []
    wrong = [number for number in ids if type(number) is not int or not 0 <= number < _MAX_IDS]
    return [f"the token id {wrong[0]!r:.60}"] if wrong else []


def _faults_of_types(value: Any) -> list[str]:
    """Return descriptions of parts with types, or with regular expressions, that are not allowed."""
    if isinstance(value, list):
        return [fault for item in value for fault in _faults_of_types(item)]
    if not isinstance(value, dict):
        return []
    faults = [fault for item in value.values() for fault in _faults_of_types(item)]
    if not isinstance(value.get("type", ""), str) or value.get("type", "Sequence") not in _TYPES:
        faults.append(f"the type {value['type']!r:.60}")
    if "Regex" in value and value["Regex"] not in _PATTERNS:
        faults.append(f"the regular expression {value['Regex']!r:.60}")
    return faults


@contextmanager
def rust_errors(problem: str, advice: str = "use another tokenizer") -> Iterator[None]:
    """Convert errors and panics of `tokenizers` in a `with` block into a ValueError of one line."""
    try:
        yield
    except BaseException as error:
        # A panic of Rust is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{problem} ({one_line(error)}); {advice}") from error
