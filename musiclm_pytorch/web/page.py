"""The page: its inputs, its music, and the endpoint `/generate` that is also the HTTP API."""

from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import gradio as gr

from audiolm_pytorch.saving.text import joined_lines
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.web.request import WebRequest, follows_melodies
from musiclm_pytorch.web.studio import Studio

__all__ = ["CSS", "THEME", "build_page"]

_FOLDER = Path(__file__).parent
_EXAMPLES = ("a fast jig played on the flute", "slow solo cello", "a waltz on the accordion")
_FILE_AGE_SECONDS = 3600
_ERRORS = (ValueError, TypeError, OSError, RuntimeError)
_IDLE = {"message": "The music appears here."}
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto !important; }
#result, #result > * { padding: 0; margin: 0; }
footer .divider { display: none; }
.recording .audio-container:has(.upload-container) { height: auto; }
.recording .upload-container { height: 104px !important; min-height: 0; padding-top: 24px; }
.recording .upload-container .wrap { min-height: 0; line-height: 1.3; }
.recording .upload-container .icon-wrap { display: none; }
#title h1 { margin: 12px 0 0; font-size: 26px; }
#title p { margin: 2px 0 8px; color: var(--body-text-color-subdued); }
"""


def build_page(studio: Studio) -> gr.Blocks:
    """Build the page of a studio; its files are deleted after an hour, and at the end."""

    def generate(
        text: str = "",
        model: str | None = None,
        seconds: float = 5.0,
        candidates: int = 4,
        seed: str | int | None = "",
        guidance: str | float | None = "",
        negative: str = "",
        story: str = "",
        continue_from: str | None = None,
        melody: str | None = None,
        live: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Generate music from a text. The result has the files and the similarity of each candidate in `pieces`."""
        values = dict(locals())
        try:
            yield from studio.run(_request({name: values[name] for name in names}))
        except _ERRORS as error:
            raise gr.Error(_line(error), print_exception=False) from error

    def show(*values: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from studio.run(_request(dict(zip(names, values))))
        except _ERRORS as error:
            yield {"error": _line(error)}

    names = list(signature(generate).parameters)
    with gr.Blocks(
        title="musiclm", analytics_enabled=False, fill_width=True, delete_cache=(300, _FILE_AGE_SECONDS)
    ) as page:
        gr.Markdown("# musiclm\nMusic from a sentence, generated on this machine.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                inputs = _build_inputs(studio)
                button = gr.Button("Generate", variant="primary", size="lg", elem_id="generate")
            with gr.Column(scale=3, min_width=340):
                result = gr.HTML(
                    _IDLE,
                    html_template=(_FOLDER / "result.html").read_text(encoding="utf-8"),
                    css_template=(_FOLDER / "result.css").read_text(encoding="utf-8"),
                    js_on_load=(_FOLDER / "result.js").read_text(encoding="utf-8"),
                    elem_id="result",
                )

        # The page shows errors in place of the music.
        now = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        run = gr.on(
            [button.click, inputs["text"].submit],
            show,
            [inputs[name] for name in names],
            result,
            show_progress="hidden",
            api_visibility="private",
        )
        result.cancel(None, cancels=[run])
        result.cancel(lambda: {"message": "Cancelled."}, None, result, **now)
        gr.Button(visible=False).click(generate, [inputs[name] for name in names], result, api_name="generate")
    page.queue(default_concurrency_limit=None)  # the studio has a queue
    return page


def _build_inputs(studio: Studio) -> dict[str, gr.components.Component]:
    """Build the inputs, by the names of the arguments of the API."""
    models, limits = studio.models, studio.limits
    are_musiclm = [isinstance(model, MusicLM) for model in models.values()]
    text = gr.Textbox("", label="Text", lines=2, autofocus=True, placeholder=f"e.g. {_EXAMPLES[0]}")
    gr.Examples([[example] for example in _EXAMPLES], text, label="Examples", api_visibility="private")
    model = gr.Dropdown(list(models), label="Model", visible=len(models) > 1, allow_custom_value=True)
    with gr.Row():
        seconds = gr.Number(5, label="Seconds", info=f"At most {limits.seconds:g}, in total", min_width=120)
        candidates = gr.Number(
            min(4, limits.candidates),
            label="Candidates",
            info=f"At most {limits.candidates}, best first",
            min_width=120,
        )
    with gr.Row():
        seed = gr.Textbox("", label="Seed", placeholder="random", info="Repeats a result", min_width=120)
        guidance = gr.Textbox(
            "",
            label="Guidance",
            placeholder="default",
            info="1 is off, 3 is common",
            min_width=120,
        )
    live = gr.Checkbox(label="Play while it is generated", info="Only the best candidate is completed.")
    with gr.Accordion("More: recordings, story, negative text", open=False):
        continue_from = _recording("Continue a recording")
        melody = _recording("Follow a melody", visible=any(map(follows_melodies, models.values())))
        story = gr.Textbox(
            "",
            label="Story",
            lines=3,
            placeholder="2.5 a slow waltz on the accordion",
            info="Text is the first part. Each line is a later part: start in seconds, then text. "
            "If the first line starts at 0, leave Text empty.",
            visible=any(are_musiclm),
        )
        negative = gr.Textbox(
            "",
            label="Negative text",
            placeholder="e.g. drums",
            info="Leads away from it",
            visible=any(are_musiclm),
        )
    return {
        **{"text": text, "model": model, "seconds": seconds, "candidates": candidates, "seed": seed},
        **{"guidance": guidance, "negative": negative, "story": story, "continue_from": continue_from},
        **{"melody": melody, "live": live},
    }


def _recording(label: str, **options: Any) -> gr.Audio:
    # The button "share" would upload the recording to a public site.
    sources = ["upload", "microphone"]
    return gr.Audio(
        label=label, sources=sources, type="filepath", buttons=["download"], elem_classes="recording", **options
    )


def _request(values: dict[str, Any]) -> WebRequest:
    """Build a request; seed and guidance are texts, because a field for numbers cannot be empty at first."""
    for name, kind, expected in (("seed", int, "a whole number"), ("guidance", float, "a number")):
        word = "" if values[name] is None else str(values[name]).strip()
        try:
            values[name] = kind(word) if word else None
        except ValueError as error:
            raise ValueError(f"{name} must be {expected}, or empty; got {word!r:.40}") from error
    return WebRequest(**values)


def _line(error: Exception) -> str:
    return joined_lines(error).removeprefix("WebRequest: ") or type(error).__name__
