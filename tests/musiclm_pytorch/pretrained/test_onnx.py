"""Codecs and decoding steps as ONNX files: equal results in onnxruntime, for all lengths."""

import json
import sys
from pathlib import Path

import pytest
import torch

from audiolm_pytorch import Codec
from audiolm_pytorch.lm.decode_step import DecodeStep
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pretrained.onnx import export_onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def check_codec(folder: Path, codec: Codec) -> None:
    """Compare encoder and decoder at three lengths, which differ from that of the example, and two batch sizes."""
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"codec_{name}.onnx") for name in ("encoder", "decoder"))
    for batch, num_samples in ((1, 4000), (2, 12_345), (1, 16_000)):
        wave = 0.1 * torch.randn(batch, codec.channels, num_samples)
        expected = codec.tokenize(wave)
        (codes,) = encoder.run(None, {"x": wave.numpy()})
        assert codes.shape == expected.shape
        assert (torch.from_numpy(codes) == expected).float().mean() > 0.99  # rounding can change a nearly equal code
        (decoded,) = decoder.run(None, {"x": expected.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(decoded), codec.decode_from_codebook_indices(expected), atol=1e-3, rtol=0
        )


@pytest.mark.slow
def test_the_bundled_codec(tmp_path: Path) -> None:
    """Parity of encoder and decoder at three lengths."""
    codec = Codec.from_pretrained("codec_16khz").eval()
    files = export_onnx(tmp_path / "new" / "out", codec, {})
    assert {path.name for path in files} == {path.name for path in (tmp_path / "new" / "out").iterdir()}
    check_codec(tmp_path / "new" / "out", codec)


@pytest.mark.slow
def test_all_parts_of_a_model(musiclm_command, micro_run: Path, tmp_path: Path, capsys) -> None:
    """`musiclm export --onnx`: parity of a decoding step with caches of three lengths, none included."""
    out = tmp_path / "out"
    words = ("export", "--run", micro_run, "--out", out, "--onnx")
    assert musiclm_command(*words) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.count("wrote") == 6
    card = json.loads((out / "onnx.json").read_text())
    audio_lm = MusicLM.from_pretrained(micro_run).audio_lm
    check_codec(out, audio_lm.codec)
    for name, stage in audio_lm.stages.items():
        session, step = onnxruntime.InferenceSession(out / f"{name}_step.onnx"), DecodeStep(stage)
        about = card["onnx_files"][f"{name}_step.onnx"]
        assert [part.name for part in session.get_inputs()] == about["inputs"] == ["ids", "extra", "keys", "values"]
        assert [part.name for part in session.get_outputs()] == about["outputs"]
        columns = session.get_inputs()[0].shape[1]
        for batch, length in ((1, 0), (3, 7), (2, 40)):
            ids = torch.randint(about["empty_id"] + 1, (batch, columns))
            cache = [torch.randn_like(step.empty_cache(batch, length)) for _ in range(2)]
            inputs = (ids, torch.randn(batch, stage.transformer.dim), *cache)
            found = session.run(None, {key: value.numpy() for key, value in zip(about["inputs"], inputs)})
            for one, wanted in zip(found, step(*inputs), strict=True):
                torch.testing.assert_close(torch.from_numpy(one), wanted.detach(), atol=1e-4, rtol=1e-3)
    (out / "codec_encoder.onnx").write_bytes(b"old")
    assert musiclm_command(*words, "--bundled", "codec", "codec_16khz") == 2
    assert "--onnx writes all weights" in capsys.readouterr().err
    assert (out / "codec_encoder.onnx").read_bytes() == b"old"


def test_files_of_others_stay_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with other files is refused, and so is an export without the extra, before anything is written."""
    codec = Codec.from_pretrained("codec_16khz")
    (tmp_path / "onnx.json").write_text("{}")
    with pytest.raises(ValueError, match="does not belong to an ONNX export"):
        export_onnx(tmp_path, codec, {})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'pip install "musiclm\[onnx\]"'):
        export_onnx(tmp_path / "new", codec, {})
    assert [path.name for path in tmp_path.iterdir()] == ["onnx.json"]
