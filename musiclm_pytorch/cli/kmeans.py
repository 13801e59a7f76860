"""`musiclm train kmeans`: any encoder and layer to semantic tokens."""

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from musiclm_pytorch.cli.checks import check_folder, device_named

if TYPE_CHECKING:
    from audiolm_pytorch.semantic import ClusterUsage

__all__ = ["TrainKmeans", "run_train_kmeans"]


@dataclass(frozen=True, kw_only=True)
class TrainKmeans:
    """Cut a layer of any encoder into semantic tokens by k-means; the same command continues what was interrupted."""

    encoder: str
    """Bundled one (16khz), folder of a saved encoder or semantic tokenizer, a HuBERT checkpoint of fairseq (.pt),
    or a folder or hub id in transformers' format, e.g. facebook/hubert-base-ls960."""
    layer: int
    """Layer whose hidden states are clustered; 9 means after the ninth block."""
    data: Path
    """Folder of audio files, or a folder or file with a JSONL manifest; held-out files are not used."""
    out: Path
    """Folder of the run; at the end the tokenizer is in OUT/tokenizer."""
    num_clusters: int = 500
    """Size of the token vocabulary."""
    max_tokens: int = 1_000_000
    """Fit on so many tokens at most; each takes 4 bytes on disk for every number of a hidden state."""
    seconds: float = 10.0
    """Length of the crops that the encoder sees."""
    seed: int = 0
    """Of the crops, the first centroids and the order."""
    offline: bool = False
    """Never ask a model hub."""
    device: str = "auto"
    """Where the encoder runs: cpu, cuda, mps, ... or auto, which takes a GPU if there is one."""


def run_train_kmeans(command: TrainKmeans) -> int:
    """Carry the command out.

    Args:
        command: What to do.

    Returns:
        Exit status 0.

    Raises:
        ImportError: If the encoder needs a package that is not installed.
        ValueError: If something cannot be done; says what was wrong and the mend.
    """
    if not command.data.exists():
        raise ValueError(f"{command.data}: no such folder or manifest; give a folder of audio files as --data")
    check_folder(command.out)

    from audiolm_pytorch.semantic import KMeansTrainer
    from audiolm_pytorch.training.distributed import create_accelerator
    from musiclm_pytorch.pipeline.run_folder import alone_in, sweep
    from musiclm_pytorch.pretrained.bundled import encoder_named

    accelerator = create_accelerator()
    encoder = encoder_named(command.encoder, offline=command.offline)
    job = KMeansTrainer(
        encoder=encoder.to(accelerator.device if command.device == "auto" else device_named(command.device)),
        layer=command.layer,
        num_clusters=command.num_clusters,
        folder=command.data,
        results_folder=command.out,
        seconds=command.seconds,
        max_tokens=command.max_tokens,
        seed=command.seed,
        accelerator=accelerator,
    )
    done_before = job.is_finished
    with alone_in(command.out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            sweep(command.out)
        accelerator.wait_for_everyone()
        fit = job.train()
    if accelerator.is_main_process:
        tokenizer, folder = fit.tokenizer, command.out / "tokenizer"
        rate = tokenizer.target_sample_hz / tokenizer.downsample_factor
        sys.stdout.write(f"{_in_words(fit.usage)}{' (done before)' if done_before else ''}\n")
        sys.stdout.write(f"tokenizer in {folder}: layer {tokenizer.layer}, {rate:g} tokens a second, ")
        sys.stdout.write(f"fingerprint {tokenizer.fingerprint()}\n")
        if job.features_folder.is_dir():
            num_bytes = sum(file.stat().st_size for file in job.features_folder.rglob("*") if file.is_file())
            sys.stdout.write(f"{job.features_folder} ({num_bytes / 1e6:,.1f} MB) is needed no more\n")
    return 0


def _in_words(usage: "ClusterUsage") -> str:
    """How the clusters are used, in one line."""
    return (
        f"{usage.num_tokens:,} tokens: {usage.used:,} of {usage.num_clusters:,} clusters used, "
        f"perplexity {usage.perplexity:.1f}, {100 * usage.explained:.1f}% of the variance explained"
    )
