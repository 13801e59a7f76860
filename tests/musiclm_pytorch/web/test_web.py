"""The web page in Chromium, and the HTTP API, of one server of the bundled model."""

import base64
import importlib.util
import json
import re
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.web import studio
from musiclm_pytorch.web.request import Limits
from musiclm_pytorch.web.server import MusicServer
from musiclm_pytorch.web.studio import _Job
from tests.helpers.toy_musiclm import musicgen_of

pytest.importorskip("gradio", reason='needs pip install "musiclm[web]"')
pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
HAS_BROWSER = importlib.util.find_spec("playwright") is not None and Path(CHROMIUM).exists()
needs_browser = pytest.mark.skipif(not HAS_BROWSER, reason="needs playwright and Chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += [
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
]
TOKEN = "correct-horse-battery"
TIMEOUT = 120_000  # of the browser, in ms


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + TIMEOUT / 1000
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def addresses() -> list[str]:
    """Addresses outside this machine to which the process connects."""
    return []


@pytest.fixture(scope="module")
def server(addresses: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[MusicServer]:
    """A server of a MusicLM and a MusicGen on loopback."""
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            addresses.append(str(address))
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("web")))
        models = {"tiny": MusicLM.from_pretrained("tiny"), "gen": musicgen_of()}
        with MusicServer(models, limits=Limits(seconds=600, candidates=2, jobs=2)) as running:
            folder = running.folder
            assert folder.is_dir()
            yield running
        assert not folder.exists()


@pytest.fixture(scope="module")
def client(server: MusicServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Python client of the API."""
    from gradio_client import Client

    return Client(server.url, verbose=False, analytics_enabled=False, download_files=tmp_path_factory.mktemp("client"))


@pytest.fixture
def spare_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave time for the browser while music is generated, on machines with one core, too."""
    report = _Job._report

    def slow(self: _Job, *progress: Any) -> None:
        time.sleep(0.003)
        report(self, *progress)

    monkeypatch.setattr(_Job, "_report", slow)


def generate(client: Any, **request: Any) -> Any:
    return client.predict(**{"text": "a flute", "seconds": 0.5, "candidates": 1, **request}, api_name="/generate")


def test_api_returns_files_with_the_request_and_their_similarity(client: Any, server: MusicServer) -> None:
    """They are those of the call of the model; the comment field of a file repeats it."""
    result = generate(client, candidates=2, seed=3)
    candidates = server.models["tiny"]("a flute", seconds=0.5, num_samples=2, seed=3, return_all=True)
    best = int(candidates.order[0, 0])
    assert [piece["seed"] for piece in result["pieces"]] == [3 + best, 4 - best]
    assert result["pieces"][0]["similarity"] == pytest.approx(float(candidates.scores[0, best]), abs=1e-3)
    with soundfile.SoundFile(result["pieces"][0]["sound"]) as file:
        assert (file.samplerate, file.frames) == (16000, 8000)
        assert np.abs(file.read() - candidates.best[0].numpy()).max() < 2e-3
        assert json.loads(file.comment) == {"seed": 3 + best, "seconds": 0.5, "model": "tiny", "text": "a flute"}
    picture = Path(result["pieces"][0]["picture"]).read_bytes()
    assert picture.startswith(b"\x89PNG") and struct.unpack(">II", picture[16:24]) == (1200, 372)
    assert server.studio.num_jobs == 0


def test_api_has_chunks_of_live_music_and_progress(client: Any) -> None:
    """All chunks together are the music, up to its peak; the client receives them while it is generated."""
    job = client.submit(text="a flute", seconds=2.5, candidates=1, seed=1, live=True, api_name="/generate")
    states = list(job)
    chunks = {chunk["number"]: chunk["samples"] for state in states for chunk in state["chunks"]}
    assert sorted(chunks) == list(range(len(chunks))) and len(chunks) >= 2
    samples = np.frombuffer(b"".join(base64.b64decode(chunks[number]) for number in sorted(chunks)), "<i2") / 32767
    wave, _ = soundfile.read(states[-1]["pieces"][0]["sound"])
    assert len(samples) == len(wave) == 40000
    assert np.abs(samples * min(1.0, np.abs(wave).max() / np.abs(samples).max()) - wave).max() < 2e-3
    fractions = [state["fraction"] for state in states]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_states_report_unknown_words_and_the_work_after_the_tokens(
    client: Any, server: MusicServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request reports its words; after the last token, the message is not "100%, about 0 s left"."""
    for owner, name in ((server.models["tiny"], "scores"), (studio, "write_picture")):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, call=call, **kw: time.sleep(0.7) or call(*args, **kw))
    request = {"text": "a gabber flute", "negative": "gabber polka", "seconds": 0.5, "candidates": 2}
    for states in (list(client.submit(**request, api_name="/generate")), [generate(client, **request)]):
        unknown, negative = states[-1]["warnings"]
        assert unknown.startswith("not in the training captions, so the music may not match: gabber (in 'a gabber")
        assert negative.startswith("not in the training captions, so the music may not match: polka")
    messages = [state["message"] for state in list(client.submit(**request, api_name="/generate"))]
    after = ["Decoding and ranking the sound", "Writing candidate 1 of 2", "Writing candidate 2 of 2"]
    assert [message for message in dict.fromkeys(messages) if message in after] == after
    assert not any(message.startswith("100%") for message in messages)
    assert generate(client)["warnings"] == []


def test_api_of_a_musicgen_and_of_recordings(client: Any, write_tone: Callable[..., Path]) -> None:
    """A MusicGen has no similarities; a recording is continued."""
    from gradio_client import handle_file

    pieces = generate(client, model="gen", candidates=2, seed=0)["pieces"]
    assert [(piece["seed"], piece["similarity"]) for piece in pieces] == [(0, None), (1, None)]
    piece = generate(client, continue_from=handle_file(write_tone(seconds=0.3)), seed=0)["pieces"][0]
    wave, _ = soundfile.read(piece["sound"])
    assert len(wave) == 8000 and np.abs(wave[:4000]).max() > 0.1


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text": ""}, "the text is empty; describe the music"),
    ({"seconds": 601}, "seconds must be above 0 and at most 600, got 601"),
    ({"seconds": "long"}, "seconds must be float, got 'long'"),
    ({"candidates": 3}, "candidates must be from 1 to 2, got 3"),
    ({"seed": 1.5}, "seed must be a whole number, or empty; got '1.5'"),
    ({"guidance": "much"}, "guidance must be a number, or empty; got 'much'"),
    ({"guidance": -1}, "guidance must be from 1 to 100"),
    ({"model": "/etc"}, "there is no model '/etc'; choose one of: tiny, gen"),
    ({"story": "1"}, "line 1 of the story has no text"),
    ({"story": "7 a cello"}, "a story changes after 7 s, but the music ends after 0.5 s"),
    ({"negative": "drums", "guidance": 1}, "negative conditions need guidance"),
    ({"negative": "drums", "model": "gen"}, "negative needs a MusicLM"),
    ({"live": "perhaps"}, "live must be bool"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_calls_of_the_api_end_in_one_line(client: Any, wrong: dict[str, Any], message: str, capfd) -> None:
    """The client raises it; the server prints no traceback and goes on."""
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        generate(client, **wrong)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_files_of_the_server_cannot_be_read(client: Any, server: MusicServer, write_tone: Callable[..., Path]) -> None:
    """A path in place of an upload is refused, in the API and as an address."""
    import httpx

    secret = write_tone("secret.wav", seconds=0.2)
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    inputs = {"text": "a flute", "model": "tiny", "seconds": 0.5, "candidates": 1, "seed": 0, "guidance": None}
    data = [*inputs.values(), "", "", file, None, False]
    started = httpx.post(f"{server.url}/gradio_api/call/generate", json={"data": data}).json()
    events = httpx.get(f"{server.url}/gradio_api/call/generate/{started['event_id']}", timeout=60).text
    assert "event: error" in events and "complete" not in events
    assert httpx.get(f"{server.url}/gradio_api/file={secret}").status_code in (403, 404)


def test_a_cancelled_request_ends_and_the_queue_is_limited(client: Any, server: MusicServer) -> None:
    """Two requests run or wait, a third one is refused; cancelled ones leave the queue."""
    from gradio_client import Client

    long = {"text": "a flute", "seconds": 600, "candidates": 1, "api_name": "/generate"}
    first = Client(server.url, verbose=False, analytics_enabled=False).submit(**long)
    until(lambda: server.studio.num_jobs == 1)
    second = client.submit(**long)
    until(lambda: server.studio.num_jobs == 2)
    with pytest.raises(Exception, match="2 requests run or wait, more are not accepted; try again later"):
        client.predict(text="a flute", api_name="/generate")
    until(lambda: second.outputs())
    assert second.outputs()[0]["message"] == "Waiting, 1 before you"
    second.cancel()
    until(lambda: server.studio.num_jobs == 1)
    first.cancel()
    until(lambda: server.studio.num_jobs == 0)


def test_others_need_the_token() -> None:
    """Without it the page, the API and files are refused; it is accepted as a link, as a cookie and in a header."""
    import httpx
    from gradio_client import Client

    with MusicServer({"gen": musicgen_of()}, host="0.0.0.0") as server:
        assert server.token and len(server.token) >= 20
    with MusicServer({"gen": musicgen_of()}, token=TOKEN) as server, httpx.Client(base_url=server.url) as browser:
        for path in ("/", "/config", "/gradio_api/info", "/gradio_api/file=/etc/hostname", "/?token=wrong-wrong-wrong"):
            refused = browser.get(path, headers={"Accept": "text/html"})
            assert refused.status_code == 401 and "Enter the token" in refused.text and "gradio" not in refused.text
        assert browser.post("/gradio_api/call/generate", json={"data": []}).status_code == 401
        assert browser.get("/", headers={"Authorization": "Bearer wrong"}).text.startswith(
            "the token is missing or wrong"
        )
        entered = browser.get("/", params={"token": TOKEN})
        assert entered.status_code == 303 and "token" not in entered.headers["location"]
        assert browser.get("/").status_code == 200
        headers = {"Authorization": f"Bearer {TOKEN}"}
        client = Client(server.url, headers=headers, verbose=False, analytics_enabled=False)
        assert generate(client, seed=0)["pieces"]


def test_pages_of_other_hosts_cannot_use_a_server_without_token(server: MusicServer) -> None:
    """An attacker whose host name resolves to 127.0.0.1 is refused."""
    import httpx

    assert httpx.get(server.url, headers={"Host": "attacker.example"}).status_code == 403
    assert httpx.get(server.url.replace("127.0.0.1", "localhost")).status_code == 200


def test_servers_with_wrong_arguments_are_refused(server: MusicServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages contain the fix; nothing is left behind."""
    port = int(server.url.rpartition(":")[2])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"port": port}, rf"port {port} \(Address already in use\); choose another port, e.g. --port {port + 1}$"),
        ({"port": 70000}, "the port must be from 0 to 65535, got 70000"),
        ({"host": "999.1.1.1"}, "cannot listen at 999.1.1.1"),
        ({"token": "short"}, "the token must have at least 12 letters, got 5"),
        ({"models": {}}, "got no models; pass at least one"),
    ]
    for arguments, message in wrong:
        with pytest.raises((ValueError, OSError), match=message):
            MusicServer(**{"models": server.models, **arguments})
    monkeypatch.setattr("musiclm_pytorch.web.server.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs gradio: pip install "musiclm\[web\]"'):
        MusicServer(server.models)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, server: MusicServer) -> Iterator[Callable[..., Any]]:
    """Open the page in a window of a user of its own; no page may request or run anything from elsewhere."""
    urls: list[str] = []
    errors: list[str] = []

    def open_(width: int = 1400, height: int = 900) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: urls.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.locator(".hint").wait_for()
        return page

    yield open_
    assert urls and [url for url in urls if not url.startswith((server.url, "data:", "blob:"))] == []
    assert errors == []


def ask(page: Any, text: str, seconds: float, candidates: int = 1) -> None:
    """Fill in the form and press the button."""
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("spinbutton", name="Seconds").fill(str(seconds))
    page.get_by_role("spinbutton", name="Candidates").fill(str(candidates))
    page.locator("#generate").click()


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_a_user_types_hears_and_downloads(open_page: Callable[..., Any], width: int, height: int, tmp_path) -> None:
    """On a wide and on a narrow window; nothing is wider than the window."""
    page = open_page(width, height)
    ask(page, "a slow waltz on the accordion", 1, candidates=2)
    page.locator(".piece, .error").first.wait_for()
    assert page.get_by_role("alert").all_inner_texts() == []
    titles = page.locator(".piece header").all_inner_texts()
    assert [title.split("\n")[0] for title in titles] == ["Candidate 1", "Candidate 2"]
    similarities = [float(re.search(r"similarity (-?[\d.]+), seed \d+, 1.0 s", title)[1]) for title in titles]
    assert similarities == sorted(similarities, reverse=True)
    piece = page.locator(".piece").first
    piece.locator("audio").evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelector('.piece audio').currentTime > 0.2", polling=200)
    assert piece.locator("audio").evaluate("audio => audio.duration") == pytest.approx(1.0, abs=0.01)
    assert piece.locator("img").evaluate("image => image.naturalWidth") == 1200
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    with page.expect_download() as download:
        piece.get_by_text("Download").click()
    download.value.save_as(tmp_path / "music.wav")
    wave, sample_hz = soundfile.read(tmp_path / "music.wav")
    assert (len(wave), sample_hz) == (16000, 16000) and np.abs(wave).max() > 0.01
    assert re.fullmatch(r"music-seed-\d+\.wav", download.value.suggested_filename)
    page.close()


@needs_browser
def test_bad_input_is_shown_in_one_line(open_page: Callable[..., Any]) -> None:
    """In place of the music, as text: tags in it are not elements of the page."""
    page = open_page()
    page.locator("#generate").click()
    assert page.get_by_role("alert").inner_text().startswith("the text is empty; describe the music")
    ask(page, "a flute", 999)
    page.get_by_role("alert").get_by_text("seconds must be above 0 and at most 600, got 999").wait_for()
    page.get_by_text("More: recordings").click()
    assert page.get_by_label("Share").count() == 0
    page.get_by_label("Story").fill("<img src=x onerror='window.attacked = true'>")
    ask(page, "a flute", 1)
    page.get_by_role("alert").get_by_text("line 1 of the story must be like").wait_for()
    assert page.locator(".error img").count() == 0 and page.evaluate("window.attacked") is None
    page.close()


@needs_browser
@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_file_that_is_no_sound_is_an_error(open_page: Callable[..., Any], tmp_path: Path, is_dropped: bool) -> None:
    """It is not left out in silence: selected or dropped, it is refused in place of the music, until it is removed."""
    page = open_page(390, 844)
    page.get_by_text("More: recordings").click()
    page.locator("input[type=file]").first.wait_for(state="attached")
    assert page.locator("#generate").bounding_box()["y"] < 1500
    if is_dropped:
        data = page.evaluate_handle(
            """() => {
                const data = new DataTransfer();
                data.items.add(new File(["a flute"], "texts.txt", {type: "text/plain"}));
                return data;
            }"""
        )
        page.locator(".recording .upload-container").first.dispatch_event("drop", {"dataTransfer": data})
    else:
        (tmp_path / "texts.txt").write_text("a flute")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "texts.txt")
    page.get_by_label("Clear").first.wait_for()
    ask(page, "a gabber flute", 1)
    page.get_by_role("alert").get_by_text("texts.txt: cannot be read as audio (it is a text file)").wait_for()
    assert page.locator(".piece").count() == 0
    page.get_by_label("Clear").first.click()
    ask(page, "a gabber flute", 1)
    page.locator(".piece").wait_for()
    assert "may not match: gabber" in page.locator(".warning").inner_text()
    page.close()


@needs_browser
@pytest.mark.usefixtures("spare_time")
def test_two_users_wait_hear_and_cancel(open_page: Callable[..., Any], server: MusicServer) -> None:
    """The second user waits for the first one, who hears the music while it is generated, and cancels it."""
    first, second = open_page(), open_page()
    first.get_by_label("Play while it is generated").check()
    ask(first, "a slow flute", 600)  # longer than the test
    first.get_by_text(re.compile(r"\d+%, about \d+ (s|min) left")).wait_for()
    ask(second, "a fast jig", 1)
    second.get_by_text("Waiting, 1 before you").wait_for()
    first.wait_for_function("Number(document.querySelector('[data-played]')?.dataset.played) >= 1", polling=200)
    first.locator(".cancel").click(force=True)  # without waiting for frames, which are rare on a busy machine
    first.get_by_text("Cancelled.").wait_for()
    second.locator(".piece").wait_for()
    assert first.locator(".piece").count() == 0 and server.studio.num_jobs == 0
    ask(first, "a slow flute", 600)  # longer than the test
    until(lambda: first.wait_for_timeout(50) or server.studio.num_jobs == 1)
    first.close()  # ends the request of this user
    until(lambda: second.wait_for_timeout(50) or server.studio.num_jobs == 0)
    second.close()


def test_nothing_outside_this_machine_is_reached(client: Any, addresses: list[str]) -> None:
    """The server and the client connected to loopback alone; this test is the last one of the file."""
    assert client and addresses == []
