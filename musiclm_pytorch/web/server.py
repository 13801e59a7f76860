"""The web server of the page and the API, on loopback, or with a token for others."""

import errno
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from audiolm_pytorch.checks.types import typed
from musiclm_pytorch.web.request import Limits, Model
from musiclm_pytorch.web.studio import Studio

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["MusicServer"]

_MAX_UPLOAD_BYTES = 50 * 2**20
_MIN_TOKEN_LETTERS = 12
_TOKEN_FORM = """<!doctype html><title>musiclm</title><meta name="viewport" content="width=device-width">
<body style="font-family: system-ui; max-width: 24em; margin: 15vh auto; padding: 0 16px">
<h1>musiclm</h1><p>Enter the token that <code>musiclm web</code> has printed.</p>
<form><input name="token" type="password" autofocus style="font-size: 16px; padding: 6px">
<button style="font-size: 16px; padding: 6px 12px">Open</button></form>"""


class MusicServer:
    """Serves a web page and an HTTP API that generate music, in threads of this process.

    It runs in a `with` block: `with MusicServer({"tiny": MusicLM.from_pretrained("tiny")}) as server: ...`

    Args:
        models: Models by name, of which a user selects one.
        host: Address of this machine to listen at. Loopback addresses are for this machine alone.
        port: Port; 0 = a free port.
        token: Word of at least 12 letters that every request needs; None = no token on loopback, and a random token at
            other addresses.
        limits: Limits of a request and of the queue.

    Attributes:
        url: Address of the page, without the token.
        token: The token; None = no token is needed.
        folder: Folder of all files while the server runs.
        studio: Runs the requests.

    Raises:
        ImportError: If gradio is missing.
        OSError: If the address cannot be used.
    """

    @typed
    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not models:
            raise ValueError("got no models; pass at least one, e.g. {'tiny': MusicLM.from_pretrained('tiny')}")
        self.models, self.limits = models, limits or Limits()
        self.token = secrets.token_urlsafe(16) if token is None and not _is_loopback(host) else token
        self._socket = listen(host, port, token)
        address = f"[{host}]" if ":" in host else socket.gethostname() if host == "0.0.0.0" else host
        self.url = f"http://{address}:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "MusicServer":
        """Start to serve."""
        self.folder = Path(tempfile.mkdtemp(prefix="musiclm-web-")).resolve()
        self._environment = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)

        import gradio
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware import Middleware

        from musiclm_pytorch.web.page import CSS, THEME, build_page

        self.studio = Studio(self.models, self.limits, self.folder)
        page = build_page(self.studio)
        # Gradio sets this only in `launch`. Without it, the API would accept paths of files that were not uploaded.
        page.has_launched = True
        app = FastAPI(middleware=[Middleware(_Gate, token=self.token)], docs_url=None, redoc_url=None, openapi_url=None)
        app = gradio.mount_gradio_app(
            app,
            page,
            path="/",
            footer_links=["api"],
            run_history=False,
            ssr_mode=False,
            max_file_size=_MAX_UPLOAD_BYTES,
            theme=THEME,
            css=CSS,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End all requests and delete all files."""
        self.studio.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        os.environ.pop("GRADIO_TEMP_DIR")
        if self._environment is not None:
            os.environ["GRADIO_TEMP_DIR"] = self._environment
        shutil.rmtree(self.folder, ignore_errors=True)


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """Check the token, and that gradio is installed, and listen at an address."""
    # Its import would create files in the folder for temporary files.
    if find_spec("gradio") is None:
        raise ImportError('the web page needs gradio: pip install "musiclm[web]"')
    if token is not None and len(token) < _MIN_TOKEN_LETTERS:
        raise ValueError(f"the token must have at least {_MIN_TOKEN_LETTERS} letters, got {len(token)}")
    if not 0 <= port < 2**16:
        raise ValueError(f"the port must be from 0 to 65535, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # `create_server` adds the address
        advice = f"port, e.g. --port {port + 1}" if error.errno == errno.EADDRINUSE else "host or port"
        raise OSError(f"cannot listen at {host}, port {port} ({reason}); choose another {advice}") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Gate:
    """Middleware that refuses requests without the token.

    Without a token, it refuses names of hosts that are not loopback. Otherwise the page of an attacker, whose host name
    he resolves to 127.0.0.1, could send requests from the browser of the user.
    """

    def __init__(self, app: "ASGIApp", token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        from starlette.requests import HTTPConnection
        from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse

        request = HTTPConnection(scope)
        cookie = f"musiclm-{scope['server'][1]}"
        answer: Any = self._app
        if self._token is None:
            if not _is_loopback((request.url.hostname or "").strip("[]")):
                answer = PlainTextResponse("this server only answers to localhost; start it with --token", 403)
        elif self._is_token(request.query_params.get("token")):
            answer = RedirectResponse(request.url.remove_query_params("token"), 303)
            answer.set_cookie(cookie, self._token, httponly=True, samesite="lax")
        elif not self._is_token(request.cookies.get(cookie)) and not self._is_token(_bearer(request)):
            wants_page = scope.get("method") == "GET" and "text/html" in request.headers.get("accept", "")
            message = "the token is missing or wrong; send the header Authorization: Bearer TOKEN"
            answer = HTMLResponse(_TOKEN_FORM, 401) if wants_page else PlainTextResponse(message, 401)
        await answer(scope, receive, send)

    def _is_token(self, word: str | None) -> bool:
        return word is not None and secrets.compare_digest(word.encode(), (self._token or "").encode())


def _bearer(request: Any) -> str | None:
    kind, _, word = request.headers.get("authorization", "").partition(" ")
    return word if kind.lower() == "bearer" else None
