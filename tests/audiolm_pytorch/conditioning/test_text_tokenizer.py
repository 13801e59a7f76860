import unicodedata

import pytest
import torch
from tokenizers import Tokenizer, processors

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer

CAPTIONS = ["slow piano ballad", "fast violin jig with drums", "slow harp melody", "a fast jig, fast drums"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=320)


@pytest.mark.parametrize(
    "text", ["slow Piano", "日本の音楽 🎻", "naïve Ünïcode", "\x00\x07 control", "a\ud800b", "Ωμέγα"]
)
def test_decoding_undoes_encoding(tokenizer: TextTokenizer, text: str) -> None:
    """Every text decodes to its normal form, in any script, without unknown tokens."""
    expected = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode().lower())
    assert tokenizer.decode(tokenizer.encode([text])) == [" ".join(expected.split())]
    assert TextTokenizer().decode(TextTokenizer().encode([text])) == [" ".join(expected.split())]


def test_tokenizer_learns_words_and_is_deterministic(tokenizer: TextTokenizer) -> None:
    """Frequent words become one token; equal captions give equal tokenizers, also through JSON."""
    assert tokenizer.encode(["slow drums"]).shape == (1, 2) and 256 < tokenizer.vocab_size <= 320
    assert TextTokenizer.train(CAPTIONS, vocab_size=320).to_json() == tokenizer.to_json()
    again = TextTokenizer.from_json(tokenizer.to_json())
    assert torch.equal(again.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_tokenizer_ignores_case_composition_and_spaces(tokenizer: TextTokenizer) -> None:
    """Different spellings of the same words have equal ids."""
    assert torch.equal(tokenizer.encode(["Café  au\nLAIT "]), tokenizer.encode(["cafe\u0301 au lait"]))


def test_wrong_arguments_raise_errors() -> None:
    """Errors name the value and what is needed."""
    with pytest.raises(ValueError, match="256"):
        TextTokenizer.train(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="min_frequency must be at least 0"):
        TextTokenizer.train(["a"], min_frequency=-1)
    with pytest.raises(ValueError, match="got no caption"):
        TextTokenizer.train(["", "  "])
    with pytest.raises(ValueError, match="JSON"):
        TextTokenizer.from_json("{}")
    with pytest.raises(ValueError, match="empty list"):
        TextTokenizer().encode([])


def test_truncation_keeps_special_tokens() -> None:
    """Truncation removes only tokens between the special tokens."""
    backend = Tokenizer.from_str(TextTokenizer().to_json())
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    plain, framed = TextTokenizer(backend), TextTokenizer(backend, special_tokens=True)
    assert (plain.num_special_tokens, framed.num_special_tokens) == (0, 2)
    letters = plain.encode(["abcdef"])[0].tolist()
    assert framed.encode(["abcdef"])[0].tolist() == [256, *letters, 257]
    assert framed.encode(["abcdef", "a"], 5).tolist() == [[256, *letters[:3], 257], [256, *letters[:2], 257, -1]]
    again = TextTokenizer.from_json(framed.to_json(), special_tokens=True)
    assert torch.equal(again.encode(["abc"]), framed.encode(["abc"]))
