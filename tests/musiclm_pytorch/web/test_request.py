"""Requests of the web page and the API: wrong ones are refused in one line, right ones are the calls of the models."""

from pathlib import Path
from typing import Any

import pytest

from musiclm_pytorch.web.request import Limits, Model, WebRequest
from tests.helpers.toy_musiclm import musicgen_of, musiclm_of

LIMITS = Limits(seconds=8, candidates=4)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """Models of random weights, without a melody."""
    return {"toy": musiclm_of(), "gen": musicgen_of()}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "the text is empty; describe the music"),
    ({"text": " \n"}, "the text is empty; describe the music"),
    ({"text": "a" * 2001}, "text has 2001 letters, at most 2000 are possible; shorten it"),
    ({"text": "\ud800"}, "text is not valid Unicode"),
    ({"text": 3}, "text must be str, got 3"),
    ({"seconds": -1}, "seconds must be above 0 and at most 8, got -1"),
    ({"seconds": 9}, "seconds must be above 0 and at most 8, got 9"),
    ({"seconds": "two"}, "seconds must be float, got 'two'"),
    ({"seconds": None}, "seconds must be float, got None"),
    ({"seconds": float("nan")}, "seconds must be a number, got NaN"),
    ({"candidates": 0}, "candidates must be from 1 to 4, got 0"),
    ({"candidates": 5}, "candidates must be from 1 to 4, got 5"),
    ({"candidates": 1.5}, "candidates must be int, got 1.5"),
    ({"seed": -1}, "seed must be from 0 to .*or empty for a random seed"),
    ({"seed": 0.5}, "seed must be int"),
    ({"guidance": 0}, "guidance must be from 1 to 100, or empty for that of the model; got 0"),
    ({"model": "huge"}, "there is no model 'huge'; choose one of: toy, gen"),
    ({"story": "soon a flute"}, 'line 1 of the story must be like "15 a slow waltz"'),
    ({"story": "2"}, "line 1 of the story has no text"),
    ({"story": "0 a flute\n2 a cello"}, "starts at 0 s, but another part already starts there; leave the text empty"),
    ({"text": "", "story": "2 a cello"}, "the first line of the story starts at 2 s, but the text is empty"),
    ({"melody": "hum.wav"}, "this model does not follow melodies; leave the melody out"),
    ({"continue_from": "none.wav"}, "continue_from: none.wav: no such file; upload a wav"),
    ({"model": "gen", "story": "1 a flute"}, "story needs a MusicLM, this model is a MusicGen; leave story empty"),
    ({"model": "gen", "negative": "drums"}, "negative needs a MusicLM"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_requests_are_refused_in_one_line(models: dict[str, Model], wrong: dict[str, Any], message: str) -> None:
    """The line names the input, its value and the fix."""
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        WebRequest(**({"text": "a flute"} if wrong and "text" not in wrong else {}), **wrong).check(models, LIMITS)
    assert "\n" not in str(caught.value)


def test_uploads_are_checked(models: dict[str, Model], tmp_path: Path, write_tone) -> None:
    """They are sound of a limited length; messages have the name of the file, not its place on the server."""
    (tmp_path / "notes.wav").write_text("no sound")
    for path, message in ((tmp_path / "notes.wav", "cannot be read as audio"), (write_tone(seconds=9.0), "has 9.0 s")):
        with pytest.raises(ValueError, match=f"continue_from: {path.name}:? .*{message}") as caught:
            WebRequest(text="a flute", continue_from=str(path)).check(models, LIMITS)
        assert str(tmp_path) not in str(caught.value)
    WebRequest(text="a flute", continue_from=str(write_tone(seconds=1.0))).check(models, LIMITS)


@pytest.mark.parametrize(
    "wrong", [{"seconds": 0}, {"seconds": 1e6}, {"candidates": 17}, {"candidates": 0}, {"jobs": 0}]
)
def test_wrong_limits_are_refused(wrong: dict[str, Any]) -> None:
    """The message names the limit."""
    with pytest.raises(ValueError, match=f"the limit of {next(iter(wrong))} must be"):
        Limits(**wrong)


def test_a_request_is_a_call_of_its_model(models: dict[str, Model]) -> None:
    """The story continues the text; guidance is that of the semantic and the coarse stage."""
    request = WebRequest(text=" a flute ", story="# later\n2 a cello\n", negative="drums", guidance=2, seconds=4)
    assert request.parts == [(0.0, "a flute"), (2.0, "a cello")]
    assert request.title == "a flute, 2 s a cello, without drums"
    WebRequest(story="0 a flute\n2 a cello").check(models, LIMITS)  # the story begins with the first part
    call = request.arguments(models["toy"], 5, print)
    assert call["text"] == request.parts and call["seed"] == 5 and call["negative_text"] == "drums"
    assert call["sampling"] == {"semantic": {"guidance_scale": 2}, "coarse": {"guidance_scale": 2}}
    call = WebRequest(text="a flute", model="gen", guidance=2).arguments(models["gen"], 5, print)
    assert call["texts"] == "a flute" and call["seeds"] == 5 and call["guidance_scale"] == 2
    assert WebRequest(seed=7).first_seed == 7
    assert WebRequest().first_seed != WebRequest().first_seed
