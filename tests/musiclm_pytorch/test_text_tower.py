import logging
import unicodedata

import pytest
import torch

from audiolm_pytorch.io import load_module, save_module
from musiclm_pytorch.mulan.text_tower import TextTransformer
from musiclm_pytorch.mulan.tokenizer import TextTokenizer

CAPTIONS = ["slow piano ballad", "fast violin jig with drums", "slow harp melody", "a fast jig, fast drums"] * 3


def _tower(tokenizer: TextTokenizer | None = None) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(dim=24, depth=2, heads=2, dim_head=8, num_tokens=320, max_seq_len=40, tokenizer=tokenizer)
    return tower.eval()


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=320)


@pytest.mark.parametrize(
    "text", ["slow Piano", "日本の音楽 🎻", "naïve Ünïcode", "\x00\x07 control", "a\ud800b", "Ωμέγα"]
)
def test_tokenizer_gives_every_text_back(tokenizer: TextTokenizer, text: str) -> None:
    """Nothing is unknown: whatever was encoded decodes to its normal form, in any script."""
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
    """Ways to type the same words have the same ids."""
    assert torch.equal(tokenizer.encode(["Café  au\nLAIT "]), tokenizer.encode(["cafe\u0301 au lait"]))


def test_tokenizer_rejects_what_it_cannot_use() -> None:
    """Errors name what was given and what is needed."""
    with pytest.raises(ValueError, match="256"):
        TextTokenizer.train(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="no text"):
        TextTokenizer.train(["", "  "])
    with pytest.raises(ValueError, match="JSON"):
        TextTokenizer.from_json("{}")
    with pytest.raises(ValueError, match="empty list"):
        TextTokenizer().encode([])


def test_str_list_and_ids_agree(tokenizer: TextTokenizer) -> None:
    """One text as str, in a list, as ids, and padded among longer ones is the same embedding."""
    tower = _tower(tokenizer)
    alone = tower("slow harp")
    torch.testing.assert_close(tower(["slow harp"]), alone)
    torch.testing.assert_close(tower(tokenizer.encode(["slow harp"])), alone)
    torch.testing.assert_close(tower(["slow harp", "fast violin jig with drums"])[:1], alone, atol=1e-5, rtol=0)
    padded = torch.nn.functional.pad(tokenizer.encode(["slow harp"]), (0, 9), value=-1)
    torch.testing.assert_close(tower(padded), alone, atol=1e-5, rtol=0)


def test_word_order_matters(tokenizer: TextTokenizer) -> None:
    """The tower is no bag of words."""
    tower = _tower(tokenizer)
    assert (tower("fast drums slow piano") - tower("slow drums fast piano")).abs().max() > 1e-3


def test_long_text_is_truncated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """What is read is exactly the first max_seq_len tokens, and the log says so."""
    tower = _tower()
    with caplog.at_level(logging.WARNING):
        long = tower("x" * 1000)
    assert "truncated" in caplog.text
    torch.testing.assert_close(long, tower("x" * 39))


def test_tower_rejects_what_it_cannot_use() -> None:
    """Errors name what was given and what is needed."""
    tower = _tower()
    for empty in ("", "  \n", ["piano", ""]):
        with pytest.raises(ValueError, match="empty"):
            tower(empty)
    with pytest.raises(ValueError, match="319"):
        tower(torch.tensor([[320]]))
    with pytest.raises(ValueError, match="token"):
        tower(torch.tensor([[5], [-1]]))
    with pytest.raises(ValueError, match="40"):
        tower(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="num_tokens"):
        TextTransformer(dim=8, depth=1, num_tokens=100)


def test_tower_survives_saving_with_its_tokenizer(tokenizer: TextTokenizer, tmp_path) -> None:
    """save_module / load_module gives the same embedding of the same string."""
    tower = _tower(tokenizer)
    save_module(tower, tmp_path / "tower")
    again = load_module(tmp_path / "tower", TextTransformer)
    assert torch.equal(again(CAPTIONS), tower(CAPTIONS))
