"""`musiclm web`: a web page and an HTTP API."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, device_named

if TYPE_CHECKING:
    import torch

    from musiclm_pytorch.web.request import Model

__all__ = ["Web"]


@dataclass(frozen=True)
class Web(ModelOptions):
    """Serve a web page and an HTTP API that generate music (needs the [web] extra). Ctrl-C ends the server."""

    model: tuple[str, ...] = ("tiny",)
    """Names of bundled models, folders of trained ones, or hub ids, one or more; the page has a choice of them."""
    host: str = "127.0.0.1"
    """Address to listen at. With an address that others reach, such as 0.0.0.0, every request needs a token."""
    port: int = 7860
    """Port to listen at; 0 selects a free port."""
    token: str | None = None
    """Token of at least 12 letters. By default none at a loopback address, else a random one, which is printed."""
    max_seconds: float = 60.0
    """Longest music, and longest recording that is uploaded."""
    max_candidates: int = 8
    """Largest number of candidates of a request, at most 16."""
    max_jobs: int = 16
    """Largest number of requests that wait or run; they run one after the other."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""

    def execute(self) -> int:
        """Serve until a signal arrives."""
        from musiclm_pytorch.web.request import Limits
        from musiclm_pytorch.web.server import MusicServer, listen

        limits = Limits(seconds=self.max_seconds, candidates=self.max_candidates, jobs=self.max_jobs)
        listen(self.host, self.port, self.token).close()  # a mistake ends the command before the models are loaded
        device = device_named(self.device)
        models = {name: self._load(name, device) for name in self.model}
        with MusicServer(models, host=self.host, port=self.port, token=self.token, limits=limits) as server:
            query = "" if server.token is None else f"/?token={server.token}"
            print(printable(f"{server.url}{query}  (Ctrl-C ends)"), flush=True)
            threading.Event().wait()
        return 0

    def _load(self, name: str, device: "torch.device") -> "Model":
        """Load a MusicLM or a MusicGen."""
        from musiclm_pytorch.musicgen.musicgen import MusicGen
        from musiclm_pytorch.musicgen.published import is_musicgen
        from musiclm_pytorch.musiclm import MusicLM

        source = self.source_of(name)
        return (MusicGen if is_musicgen(**source) else MusicLM).from_pretrained(**source, device=device)
