"""`musiclm web`: wrong options, and a server that Ctrl-C ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.bad_input import bad_input, check_bad_input, listing
from tests.helpers.processes import with_default_sigint

pytest.importorskip("gradio", reason='needs pip install "musiclm[web]"')
pytestmark = pytest.mark.slow


@bad_input("""
port | web --port 70000 | the port must be from 0 to 65535, got 70000
no address | web --port 0 --host 999.1.1.1 | cannot listen at 999.1.1.1, port 0 .*; choose another host or port
short token | web --port 0 --token short | the token must have at least 12 letters, got 5
no seconds | web --port 0 --max-seconds 0 | the limit of seconds must be above 0 and at most 3600, got 0
many candidates | web --port 0 --max-candidates 99 | the limit of candidates must be from 1 to 16, got 99
no jobs | web --port 0 --max-jobs 0 | the limit of jobs must be at least 1, got 0
no model | web --port 0 --model nobody | there is no folder nobody
no number | web --port http | --port.*'http'
unknown option | web --prot 80 | --prot.*--port
""")
def test_wrong_options_end_in_one_line(musiclm_command, words, message, tmp_path, capfd):
    """Before a model is loaded; nothing is left behind."""
    check_bad_input(musiclm_command, words, message, {"TMP": tmp_path}, capfd)


def test_others_get_a_link_with_a_token_and_ctrl_c_ends_the_server(tmp_path: Path) -> None:
    """The link is the only line; without its token, the server refuses; no file is left."""
    import httpx

    words = "-m musiclm_pytorch.cli web --host 0.0.0.0 --port 0 --model tiny".split()
    program = with_default_sigint([sys.executable, *words])
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, cwd=tmp_path, **pipes) as server:
        line = server.stdout.readline()
        link = re.match(r"http://[^/]+:(\d+)/\?token=(\S{20,})  \(Ctrl-C ends\)\n", line)
        assert link, line + server.stderr.read()
        url = f"http://127.0.0.1:{link[1]}"
        assert httpx.get(url).status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            assert "gradio" in browser.get(f"{url}/?token={link[2]}").text
        server.send_signal(signal.SIGINT)
        try:
            printed, errors = server.communicate(timeout=60)
        finally:
            server.kill()  # a server that goes on would never end the block
    assert server.returncode == 130 and printed == ""
    assert errors.splitlines()[-1] == "musiclm: stopped by SIGINT", errors
    assert listing(tmp_path) == {}
