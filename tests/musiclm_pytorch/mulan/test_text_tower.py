import logging

import pytest
import torch

from audiolm_pytorch.conditioning.text_tokenizer import TextTokenizer
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.mulan.text_tower import TextTransformer, report_unknown_words, words_of

CAPTIONS = ["slow piano ballad", "fast violin jig with drums", "slow harp melody", "a fast jig, fast drums"] * 3


def _tower(tokenizer: TextTokenizer | None = None) -> TextTransformer:
    torch.manual_seed(0)
    tower = TextTransformer(dim=24, depth=2, heads=2, dim_head=8, num_tokens=320, max_seq_len=40, tokenizer=tokenizer)
    return tower.eval()


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=320)


def test_str_list_and_ids_agree(tokenizer: TextTokenizer) -> None:
    """A text has one embedding as str, in a list, as ids, and padded in a batch of longer ones."""
    tower = _tower(tokenizer)
    alone = tower("slow harp")
    torch.testing.assert_close(tower(["slow harp"]), alone)
    torch.testing.assert_close(tower(tokenizer.encode(["slow harp"])), alone)
    torch.testing.assert_close(tower(["slow harp", "fast violin jig with drums"])[:1], alone, atol=1e-5, rtol=0)
    padded = torch.nn.functional.pad(tokenizer.encode(["slow harp"]), (0, 9), value=-1)
    torch.testing.assert_close(tower(padded), alone, atol=1e-5, rtol=0)


def test_word_order_matters(tokenizer: TextTokenizer) -> None:
    """The order of words changes the embedding."""
    tower = _tower(tokenizer)
    assert (tower("fast drums slow piano") - tower("slow drums fast piano")).abs().max() > 1e-3


def test_long_text_is_truncated_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Exactly the first max_seq_len tokens are read, and the log reports it."""
    tower = _tower()
    with caplog.at_level(logging.WARNING):
        long = tower("x" * 1000)
    assert "truncated" in caplog.text
    torch.testing.assert_close(long, tower("x" * 39))


def test_tower_rejects_what_it_cannot_use() -> None:
    """Error messages name the input and the requirement."""
    tower = _tower()
    for empty in ("", "  \n", ["piano", ""]):
        with pytest.raises(ValueError, match="empty"):
            tower(empty)
    with pytest.raises(ValueError, match="319"):
        tower(torch.tensor([[320]]))
    with pytest.raises(ValueError, match="all -1"):
        tower(torch.tensor([[5], [-1]]))
    for gap in ([[5, -1, 7]], [[-1, 5, 7]]):
        with pytest.raises(ValueError, match="on the right"):
            tower(torch.tensor(gap))
    with pytest.raises(ValueError, match="40"):
        tower(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="num_tokens"):
        TextTransformer(dim=8, depth=1, num_tokens=100)


def test_tower_survives_saving_with_its_tokenizer(tokenizer: TextTokenizer, tmp_path) -> None:
    """A saved and loaded tower has the same embedding of a string."""
    tower = _tower(tokenizer)
    save_module(tower, tmp_path / "tower")
    again = load_module(tmp_path / "tower", TextTransformer)
    assert torch.equal(again(CAPTIONS), tower(CAPTIONS))


def test_layers_are_the_means_of_the_encoders_states(tokenizer: TextTokenizer) -> None:
    """Every row of `embed_layers`, in any order; the last layer equals `forward`."""
    tower = _tower(tokenizer)
    assert tower.depth == 2
    texts = ["slow harp", "fast violin jig with drums"]
    found = tower.embed_layers(texts, layers=(2, 0, 1, 2))
    assert found.shape == (4, 2, 24) and torch.equal(found[0], tower(texts)) and torch.equal(found[0], found[3])
    for row, text in enumerate(texts):
        state = tower.embedding(tokenizer.encode([text]))
        torch.testing.assert_close(found[1, row], state.mean(dim=1)[0], atol=1e-5, rtol=0)
        for layer, block_states in ((2, tower.encoder.hidden_states(state, layers=(1,))[0]), (0, tower.encoder(state))):
            torch.testing.assert_close(found[layer, row], block_states.mean(dim=1)[0], atol=1e-5, rtol=0)
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=r"0\.\.2"):
            tower.embed_layers(texts, layers=(layer,))


def test_words_of_captions_are_the_most_frequent_ones() -> None:
    """Case, Unicode composition, digits and single letters are not new words; ties and order are fixed."""
    captions = ["A slow Caf\u00e9 waltz, 120 bpm", "slow cafe\u0301 drums!", "Slow DRUMS_x", "STRASSE straße"]
    assert words_of(captions) == ["bpm", "café", "drums", "slow", "strasse", "waltz"]
    assert words_of(captions, limit=2) == ["café", "slow"] and words_of([]) == []
    with pytest.raises(ValueError, match="at least 1"):
        words_of(captions, limit=0)


def test_text_of_unseen_words_is_reported_once(tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """A prompt of unknown words is reported once, with the words."""
    tower = _tower(tokenizer)
    tower.known_words = words_of(CAPTIONS)

    def reports(*texts: str) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="musiclm_pytorch"):
            report_unknown_words(torch.nn.Sequential(tower), texts)
        return [record.getMessage() for record in caplog.records]

    messages = reports("slow piano", "Shoegaze wall, slow")
    assert len(messages) == 1 and "shoegaze, wall (in" in messages[0]
    assert reports("slow wall shoegaze") == [], "once a word"
    (message,) = reports("slow fast gabber")
    assert "match: gabber (in" in message, "also a single word"
    assert reports("120 4/4 !") == []
    (message,) = reports("a fast pianno")
    assert "match: pianno [piano?] (in" in message, "a similar known word is named"
    assert len(reports("日本の音楽")) == 1
    (_, message) = reports("piano without drums")
    assert "negative text" in message and reports("slow without piano") == [], "negation is reported once"
    tower.known_words = None
    assert reports("vaporwave") == [], "without known words there is no report"
    caplog.clear()
    tower(["vaporwave", "x" * 200])
    (record,) = caplog.records  # training and evaluation embed captions without reports of words
    assert "is truncated" in record.getMessage()


def test_known_words_are_saved_and_old_files_have_none(tokenizer: TextTokenizer, tmp_path) -> None:
    """Words are saved in the config; a config without them loads."""
    tower = _tower(tokenizer)
    assert "known_words" not in tower.config
    save_module(tower, tmp_path / "old")
    assert load_module(tmp_path / "old", TextTransformer).known_words is None
    tower.known_words = ["slow", "harp"]
    save_module(tower, tmp_path / "new")
    again = load_module(tmp_path / "new", TextTransformer)
    assert again.known_words == ["slow", "harp"] and again.config == tower.config
    assert TextTransformer.from_config(tower.config).known_words == ["slow", "harp"]
