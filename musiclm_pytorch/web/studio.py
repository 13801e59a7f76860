"""Runs the requests of the page and the API, one after the other, in one thread."""

import base64
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from audiolm_pytorch.audio.files import peak_safe, write_audio
from musiclm_pytorch.generation.candidates import MusicChunk
from musiclm_pytorch.generation.prompts import request_comment
from musiclm_pytorch.mulan.text_tower import prompt_warnings
from musiclm_pytorch.musicgen.musicgen import MusicGen
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.web.picture import write_picture
from musiclm_pytorch.web.request import Limits, Model, WebRequest

__all__ = ["Studio"]

_POLL_SECONDS = 0.25
_KEPT_CHUNKS = 4  # a browser may skip an update

_Candidate = tuple[Tensor, int, float | None]  # wave, seed and similarity


class Studio:
    """Generates music for requests and writes it to files.

    Args:
        models: Models by name.
        limits: Limits of a request.
        folder: Folder of the files, a new folder in it for every request.
    """

    def __init__(self, models: Mapping[str, Model], limits: Limits, folder: Path) -> None:
        self.models, self.limits, self._folder = models, limits, folder
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="music")
        self._jobs: list[_Job] = []  # the first one runs

    def run(self, request: WebRequest) -> Iterator[dict[str, Any]]:
        """Generate music; yield the state of the page four times a second, and at last the state with the music.

        A state has the keys `running`, `message`, `fraction` (the finished share), `chunks` (new sound of a live
        request), `warnings` (of words that the model does not know), and `pieces` (files and similarity of each
        candidate, best first). Closing the iterator cancels the request.
        """
        request.check(self.models, self.limits)
        if self.num_jobs >= self.limits.jobs:
            raise RuntimeError(f"{self.num_jobs} requests run or wait, more are not accepted; try again later")
        job = _Job(request, self.models, Path(tempfile.mkdtemp(dir=self._folder)))
        self._jobs.append(job)
        result: Future[list[dict[str, Any]]] = self._worker.submit(job.work)
        try:
            yield job.state(self._jobs.index(job))
            while not wait([result], timeout=_POLL_SECONDS).done:
                yield job.state(self._jobs.index(job))
            yield {**job.state(0), "running": False, "message": "", "pieces": result.result()}
        except CancelledError as error:
            raise RuntimeError("the request was cancelled, because the server ends") from error
        finally:
            job.is_cancelled = True
            result.cancel()
            self._jobs.remove(job)

    @property
    def num_jobs(self) -> int:
        """Number of requests that run or wait."""
        return len(self._jobs)

    def close(self) -> None:
        """Cancel all requests."""
        for job in list(self._jobs):
            job.is_cancelled = True
        self._worker.shutdown(cancel_futures=True)


class _Job:
    """One request while it runs."""

    def __init__(self, request: WebRequest, models: Mapping[str, Model], folder: Path) -> None:
        self.request, self.is_cancelled = request, False
        self._name, self._folder = request.name_of_model(models), folder
        self.model = models[self._name]
        self._warnings = prompt_warnings(self.model, [text for _, text in request.parts] + [request.negative])
        self._started: float | None = None
        self._fraction, self._writing = 0.0, ""
        self._shares = _shares_of(self.model)
        self._finished = dict.fromkeys(self._shares, 0.0)
        self._new_chunks: SimpleQueue[str] = SimpleQueue()
        self._chunks: list[dict[str, Any]] = []

    def work(self) -> list[dict[str, Any]]:
        """Generate the music and write it to files; runs in the thread of the models."""
        self._started = time.monotonic()
        seed = self.request.first_seed
        arguments = self.request.arguments(self.model, seed, self._report)
        candidates = (self._stream if self.request.live else self._generate)(arguments, seed)
        pieces = []
        for number, candidate in enumerate(candidates, start=1):
            self._writing = f"Writing candidate {number} of {len(candidates)}"
            pieces.append(self._piece(number, *candidate))
        return pieces

    def state(self, num_before: int) -> dict[str, Any]:
        """Return what the page shows; `num_before` is the number of requests that run before this one."""
        while not self._new_chunks.empty():
            number = self._chunks[-1]["number"] + 1 if self._chunks else 0
            self._chunks.append({"number": number, "samples": self._new_chunks.get()})
        del self._chunks[:-_KEPT_CHUNKS]
        message = f"Waiting, {num_before} before you" if num_before else "Starting"
        if self._writing or self._fraction > 0.99:  # the tokens are known
            is_ranked = isinstance(self.model, MusicLM) and not self.request.live
            message = self._writing or ("Decoding and ranking the sound" if is_ranked else "Decoding the sound")
        elif self._started is not None and self._fraction:
            left = (time.monotonic() - self._started) * (1 - self._fraction) / self._fraction
            message = f"{self._fraction:.0%}, about {_duration(left)} left"
        return {
            "running": True,
            "message": message,
            "fraction": round(self._fraction, 3),
            "chunks": list(self._chunks),
            "warnings": self._warnings,
            "sample_hz": self.model.sample_hz,
            "pieces": [],
        }

    def _report(self, *progress: Any) -> None:
        """Callback of the models: (stage of a MusicLM, known frames, requested frames)."""
        if self.is_cancelled:
            raise CancelledError
        stage, known, requested = ("", *progress)[-3:]
        self._finished[stage] = known / requested
        # The candidates of a stream begin again after they are ranked.
        finished = sum(share * self._finished[name] for name, share in self._shares.items())
        self._fraction = max(self._fraction, finished)

    def _generate(self, arguments: dict[str, Any], seed: int) -> list[_Candidate]:
        """Return all candidates, best first."""
        if isinstance(self.model, MusicGen):
            waves = self.model.generate(**arguments).waves
            return [(wave, seed + item, None) for item, wave in enumerate(waves)]
        candidates = self.model(**arguments, return_all=True)
        rows = list(zip(candidates.waves[0], candidates.seeds[0], candidates.scores[0].tolist()))
        return [rows[item] for item in candidates.order[0].tolist()]

    def _stream(self, arguments: dict[str, Any], seed: int) -> list[_Candidate]:
        """Send the only or the best candidate in chunks while it is generated, and return it."""
        if isinstance(self.model, MusicGen):
            arguments["num_samples"] = 1
        parts, score = [], None
        for chunk in self.model.stream(**arguments):
            wave = chunk.waves[0].cpu()
            parts.append(wave)
            samples = ((wave.mean(dim=0) if wave.ndim == 2 else wave).clamp(-1, 1) * 32767).round()
            self._new_chunks.put(base64.b64encode(samples.numpy().astype("<i2").tobytes()).decode())
            if isinstance(chunk, MusicChunk) and chunk.scores is not None:
                seed, score = chunk.seeds[0], float(chunk.scores.max())
        return [(torch.cat(parts, dim=-1), seed, score)]

    def _piece(self, number: int, wave: Tensor, seed: int, score: float | None) -> dict[str, Any]:
        """Write a wave and its picture, and return what the page shows of them."""
        from gradio import FileData

        if not wave.isfinite().all():
            raise RuntimeError("the model generated NaN samples; train it longer, or choose another model")
        if self.is_cancelled:
            raise CancelledError
        request, wave, sample_hz = self.request, peak_safe(wave.float().cpu()), self.model.sample_hz
        comment = request_comment(request.title, seed=seed, seconds=request.seconds, model=self._name)
        sound, picture = (self._folder / f"music-seed-{seed}{suffix}" for suffix in (".wav", ".png"))
        write_audio(sound, wave, sample_hz, comment=comment)
        write_picture(picture, wave.mean(dim=0) if wave.ndim == 2 else wave, sample_hz)
        similarity = "" if score is None else f"similarity {score:.3f}, "
        return {
            "title": f"Candidate {number}",
            "details": f"{similarity}seed {seed}, {wave.shape[-1] / sample_hz:.1f} s",
            "seed": seed,
            "similarity": score,
            "sound": FileData(path=str(sound), orig_name=sound.name).model_dump(),
            "picture": FileData(path=str(picture), orig_name=picture.name).model_dump(),
        }


def _shares_of(model: Model) -> dict[str, float]:
    """Return the share of each stage of a model in the number of all tokens."""
    if isinstance(model, MusicGen):
        return {"": 1.0}
    streams = {name: stage.layout.predicted[0] for name, stage in model.audio_lm.stages.items()}
    tokens = {name: float(stream.exact_hz * stream.num_levels) for name, stream in streams.items()}
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
