"""Tokenizers in JSON of unknown origin: no padding, no unbounded ids, no slow expressions, no panics."""

import json
import time

import pytest

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer, ids_of


def changed(**entries):
    """The JSON of an untrained tokenizer with changed entries."""
    return json.dumps({**json.loads(TextTokenizer().to_json()), **entries})


def model(**entries):
    """The model of an untrained tokenizer with changed entries."""
    return {**json.loads(TextTokenizer().to_json())["model"], **entries}


def test_padding_and_truncation_are_not_taken_over():
    """Padding to 2^31 would need gigabytes for one word."""
    padding = {"strategy": {"Fixed": 2**31}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = TextTokenizer.from_json(changed(padding=padding, truncation=truncation))
    assert tokenizer.encode(["two words"]).shape == TextTokenizer().encode(["two words"]).shape


SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(model=model(vocab={"a": 2**31})), "the token id 2147483648"),
        (changed(model=model(vocab={"a": -1})), "the token id -1"),
        (changed(model=model(vocab={"a": 1.5})), "the token id 1.5"),
        (changed(added_tokens=[{"id": 2**31, "content": "x"}]), "the token id 2147483648"),
        (changed(pre_tokenizer=SLOW), "the regular expression"),
        (changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SLOW]}), "the regular expression"),
        (changed(normalizer={"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}), "the regular"),
        (changed(pre_tokenizer={"type": "Python"}), "the type 'Python'"),
        (changed(decoder={"type": ["ByteLevel"]}), "the type"),
        (changed(model={"type": "Own"}), "the model type 'Own'"),
        (changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "not a tokenizer in JSON"),
        (changed(version="9.9"), "not a tokenizer in JSON"),
        ("[" * 100_000, "not a tokenizer in JSON"),
        ("{}", "it has no model"),
    ],
    ids=lambda value: value[:40] if value.startswith("the") else "",
)
def test_hostile_tokenizer_is_refused_in_one_line(text, message):
    """Each of these needed gigabytes, raised an IndexError, ran for hours or panicked."""
    started = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        TextTokenizer.from_json(text)
    assert "\n" not in str(caught.value) and time.process_time() - started < 5


def test_id_beyond_the_embeddings_is_named():
    """Vocabularies may have gaps, so that an id can be larger than the number of tokens."""
    tokenizer = TextTokenizer.from_json(changed(model=model(vocab={"a": 0, "\u0120": 1000, "b": 2})))
    with pytest.raises(ValueError, match="the tokenizer returned the id 1000, but the text encoder has 256 ids"):
        ids_of("a b", tokenizer, 256, 8)
