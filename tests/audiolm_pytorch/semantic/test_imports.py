"""Semantic tokens work without fairseq, omegaconf, torchaudio and a network; only k-means training needs scikit-learn.

Published files are written here, with the packages that made them; another process, in which these packages cannot be
imported, reads them and must give the same tokens.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from audiolm_pytorch.audio.files import write_audio
from tests.helpers.published_files import tiny_hubert, write_hubert_checkpoint, write_kmeans
from tests.helpers.published_vq_wav2vec import naive_codes, vq_settings, vq_state, write_vq_wav2vec
from tests.helpers.semantic_sounds import written_corpus, written_digits

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # processes of their own, which import everything

ROOT = Path(__file__).parents[3]
GONE = ("fairseq", "omegaconf", "torchaudio")
KMEANS = ("sklearn", "joblib")
BLOCK = """
import json, socket, sys
from pathlib import Path
blocked, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
for name in blocked:
    sys.modules[name] = None  # importing it fails, and looking for it finds nothing
def refuse(*args, **kwargs): raise OSError("network")
socket.socket.connect = refuse
"""
# Every way to open a tokenizer or an encoder that somebody else has trained.
OPEN = """
import torch
import audiolm_pytorch
from audiolm_pytorch import FairseqVQWav2Vec, HubertWithKmeans, open_encoder
from audiolm_pytorch.saving.modules import load_module, save_module
from musiclm_pytorch.cli import app as cli

wave = torch.load(folder / "wave.pt", weights_only=True)
found = {}
for name in ("plain.bin", "compressed.bin", "centroids.safetensors"):
    for checkpoint in ("hubert.pt", "omegaconf.pt", "args.pt", "transformers"):
        tokenizer = HubertWithKmeans(folder / checkpoint, folder / name)
        found[f"HubertWithKmeans {checkpoint} {name}"] = tokenizer(wave)
save_module(tokenizer, folder / "saved")
found["load_module"] = load_module(folder / "saved")(wave)
for kind in ("gumbel", "kmeans"):
    found[f"FairseqVQWav2Vec {kind}"] = FairseqVQWav2Vec(folder / f"{kind}.pt")(wave)
    words = ["convert", "vq-wav2vec", "--checkpoint", folder / f"{kind}.pt", "--out", folder / f"out {kind}"]
    assert cli.main([str(word) for word in words]) == 0
    found[f"convert vq-wav2vec {kind}"] = load_module(folder / f"out {kind}")(wave)
words = ["convert", "hubert", "--checkpoint", folder / "hubert.pt", "--kmeans", folder / "plain.bin"]
assert cli.main([str(word) for word in [*words, "--out", folder / "out hubert"]]) == 0
found["convert hubert"] = load_module(folder / "out hubert")(wave)
features = {name: open_encoder(folder / name).features(wave, None, 9)[0] for name in
            ("hubert.pt", "transformers", "saved", "out hubert")}
torch.save(dict(found=found, features=features), folder / "found.pt")
"""
# What is trained here: the own encoder, and k-means of any; then everything is measured.
TRAIN = """
from audiolm_pytorch import BestRQEncoder, SemanticTokenizerTrainer
from audiolm_pytorch.saving.modules import save_module
from musiclm_pytorch.cli import app as cli

sizes = dict(dim=16, depth=2, heads=1, dim_head=16, sample_hz=8000, num_mels=20, n_fft=512, hop_length=80)
trainer = SemanticTokenizerTrainer(encoder=BestRQEncoder(**sizes), folder=folder / "music", batch_size=2,
                                   num_train_steps=2, seconds=1.0, results_folder=folder / "own")
trainer.train()
save_module(trainer.task.module.encoder, folder / "own encoder")
assert not any(name in sys.modules for name in ("sklearn", "joblib")), "k-means was not trained yet"
for name, layer in (("hubert.pt", 9), ("own encoder", 1)):
    words = ["train", "kmeans", "--encoder", folder / name, "--layer", layer, "--data", folder / "music",
             "--out", folder / f"kmeans of {name}", "--num-clusters", 8, "--seconds", 1]
    assert cli.main([str(word) for word in words]) == 0
words = ["evaluate", "semantic", "--encoder", folder / "own encoder", "--data", folder / "music",
         "--labels", "pitch_class", "--out", folder / "report", "--layers", 1, "--clusters", 8]
assert cli.main([str(word) for word in words]) == 0
"""
CHECK = """
roots = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not roots & set(blocked), roots & set(blocked)
"""


def run_without(blocked: tuple[str, ...], program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process that cannot import the blocked packages, and check its exit status."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BLOCK + program + CHECK), json.dumps(blocked), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with files in the published layouts."""
    folder = tmp_path_factory.mktemp("published")
    model = tiny_hubert()
    write_hubert_checkpoint(folder / "hubert.pt", model)
    write_hubert_checkpoint(folder / "omegaconf.pt", model, omegaconf=True)
    write_hubert_checkpoint(folder / "args.pt", model, args=True, legacy=True)
    model.save_pretrained(folder / "transformers")
    for kind in ("gumbel", "kmeans"):
        write_vq_wav2vec(folder / f"{kind}.pt", vq_settings(vq_type=kind))
    return folder


@pytest.mark.slow
def test_published_files_open_without_the_packages_that_made_them(published):
    """Every way to open a file gives the tokens of transformers and scikit-learn."""
    model, wave = tiny_hubert(), torch.randn(2, 9000)
    frames = model(wave, output_hidden_states=True).hidden_states[9]
    centroids = frames[0, ::2].contiguous()
    estimator = write_kmeans(published / "plain.bin", centroids.numpy())
    write_kmeans(published / "compressed.bin", centroids.numpy(), compress=("zlib", 3))
    save_file({"centroids": centroids}, published / "centroids.safetensors")
    torch.save(wave, published / "wave.pt")
    run_without((*GONE, *KMEANS), OPEN, published)
    written = torch.load(published / "found.pt", weights_only=True)
    expected = torch.stack([torch.from_numpy(estimator.predict(item.numpy())).long() for item in frames])
    assert expected.unique().numel() > 5 and len(written["found"]) == 18
    for way, ids in written["found"].items():
        kind = next((kind for kind in ("gumbel", "kmeans") if way.endswith(kind)), None)
        if kind is None:
            assert torch.equal(ids, expected), way
            continue
        settings = vq_settings(vq_type=kind)
        for item, found in zip(wave, ids, strict=True):
            codes, _ = naive_codes(vq_state(settings), settings, item)
            assert found.tolist() == (codes + torch.tensor([0, settings["vq_vars"]])).flatten().tolist(), way
    for way, features in written["features"].items():
        torch.testing.assert_close(features, frames, atol=1e-5, rtol=1e-5, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.slow
def test_training_and_measuring_need_none_of_the_three(published, tmp_path):
    """Training an encoder, k-means and the semantic evaluation need only scikit-learn, for k-means."""
    written_corpus(tmp_path / "music")
    written_digits(tmp_path / "speech")
    (tmp_path / "hubert.pt").write_bytes((published / "hubert.pt").read_bytes())
    write_audio(tmp_path / "music" / "tone.wav", torch.randn(16_000) / 10, 8000)
    said = run_without(GONE, TRAIN, tmp_path).stdout
    assert said.count("of 8 clusters used") == 2 and "Linear probes" in said


@pytest.mark.slow
def test_without_scikit_learn_training_k_means_alone_fails(published, tmp_path):
    """Features are stored before the import of scikit-learn fails with an error of one line."""
    for name in ("tone", "noise"):
        write_audio(tmp_path / "sounds" / f"{name}.wav", torch.randn(32_000) / 10, 16_000)
    words = dict(encoder=published / "hubert.pt", layer=9, data=tmp_path / "sounds", out=tmp_path / "out")
    parts = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    program = f"""
from musiclm_pytorch.cli import app as cli
assert cli.main(["train", "kmeans", *{parts!r}, "--num-clusters", "4"]) == 2
"""
    said = run_without((*GONE, *KMEANS), program, tmp_path).stderr
    assert (tmp_path / "out" / "features").is_dir() and "sklearn" in said and said.count("musiclm: ") == 1
