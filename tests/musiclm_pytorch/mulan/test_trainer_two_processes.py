"""Training of MuLaN with two processes on the CPU (gloo), checked by the files that they write."""

import json
import sys
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import AudioItem
from audiolm_pytorch.saving.files import read_weights
from musiclm_pytorch.mulan import MuLaN, SigmoidContrastiveLearning, SoftmaxContrastiveLearning
from musiclm_pytorch.mulan.captions import CaptionSampler
from musiclm_pytorch.mulan.layers import LayerContrast
from musiclm_pytorch.mulan.trainer import MuLaNTrainer
from tests.helpers.processes import run_two_processes
from tests.helpers.tiny_mulan import tiny_mulan, tones

# Eleven clips with one, two or three captions, some of them shared: processes have unequal numbers of texts.
PITCHES_HZ = [100 + 90 * clip for clip in range(11)]


def models() -> dict[str, tuple[MuLaN, int | None]]:
    """Models to train, each with its chunk size."""
    layers = LayerContrast(layers=((1, 1),), weight=0.5)
    return {
        "softmax": (tiny_mulan(), None),
        "chunks and layers": (tiny_mulan(layer_contrast=layers), 3),
        "decoupled": (tiny_mulan(loss=SoftmaxContrastiveLearning(decoupled=True)), None),
        "sigmoid": (tiny_mulan(loss=SigmoidContrastiveLearning()), 3),
    }


def train(folder: Path, results: Path, batch_size: int) -> None:
    """Train every model for three steps on the clips of a folder."""
    items = []
    for clip in range(len(PITCHES_HZ)):
        captions = [f"tone {clip}", f"tone of {clip % 4} kinds", f"clip number {clip}"][: 1 + clip % 3]
        items.append(AudioItem(folder / f"{clip}.wav", None, {"captions": captions}, 8000, 4800))
    for name, (mulan, chunk_size) in models().items():
        trainer = MuLaNTrainer(
            mulan=mulan,
            items=(items, items[:4]),
            batch_size=batch_size,
            num_train_steps=3,
            seconds=0.4,
            captions=CaptionSampler(captions_per_clip=3),
            chunk_size=chunk_size,
            results_folder=results / name,
            # Adam divides by the size of a gradient: of one that is nearly zero it makes a step out of rounding errors.
            learning_rate=3e-4,
            warmup_steps=1,
            log_every=1,
        )
        trainer.train()


def run_two(folder: Path, results: Path) -> None:
    """Train in two processes, and check that both runs finish."""
    done = run_two_processes(__file__, folder, results)
    assert all((results / name / "finished.json").is_file() for name in models()), done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_joined_batch(tmp_path: Path) -> None:
    """Three steps with two processes of 4 clips end at the weights, loss and chance of one process with 8 clips."""
    for clip, hz in enumerate(PITCHES_HZ):
        write_audio(tmp_path / f"{clip}.wav", tones(hz, seconds=0.6)[0], 8000)
    train(tmp_path, tmp_path / "one", batch_size=8)
    run_two(tmp_path, tmp_path / "two")
    for name, (untrained, _) in models().items():
        folders = [tmp_path / count / name for count in ("one", "two")]
        one, two = (read_weights(folder / "checkpoint" / "model.safetensors")[0] for folder in folders)
        assert sorted(one) == sorted(two)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5, msg=f"{name}: {key}")
        moved = [float((one[key] - value).abs().max()) for key, value in untrained.state_dict().items() if key in one]
        assert max(moved) > 3e-4
        rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in folders]
        for row, other in zip(*rows, strict=True):
            figures = [key for key in row if key not in ("seconds", "phase")]
            assert [other[key] for key in figures] == pytest.approx([row[key] for key in figures], rel=1e-4), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), Path(sys.argv[2]), batch_size=4)
