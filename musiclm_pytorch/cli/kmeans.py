"""`musiclm train kmeans`: train a semantic tokenizer on a layer of any encoder."""

from dataclasses import dataclass
from pathlib import Path

from audiolm_pytorch.saving.text import printable
from musiclm_pytorch.cli.checks import ModelOptions, check_at_least, check_data, check_folder, device_named

__all__ = ["TrainKmeans"]


@dataclass(frozen=True, kw_only=True)
class TrainKmeans(ModelOptions):
    """Train a semantic tokenizer by k-means on a layer of any encoder.

    To continue an interrupted training, run the same command again.
    """

    encoder: str
    """Bundled encoder (semantic_16khz), folder of a saved encoder or semantic tokenizer, HuBERT
    checkpoint of fairseq (.pt), or folder or hub id in transformers' format, e.g. facebook/hubert-base-ls960."""
    layer: int
    """Layer whose hidden states are clustered. 9 is the output of the ninth block."""
    data: Path
    """Folder of audio files, or a folder or file with a JSONL manifest. Held-out files are not used."""
    out: Path
    """Folder of the run. The tokenizer is written into OUT/tokenizer."""
    num_clusters: int = 500
    """Size of the token vocabulary."""
    max_tokens: int = 1_000_000
    """Maximum number of hidden states to fit. Each needs 4 bytes of disk per dimension."""
    seconds: float = 10.0
    """Length of the crops that are encoded."""
    seed: int = 0
    """Seed of the crops, the first centroids and the order."""
    device: str = "auto"
    """Device of the encoder: cpu, cuda, mps, ... or auto, which selects a GPU if there is one."""

    def execute(self) -> int:
        """Train the tokenizer and print how many of its clusters are used."""
        check_at_least(self, seed=0)
        check_data(self.data)
        check_folder(self.out)

        from audiolm_pytorch.semantic import KMeansTrainer
        from audiolm_pytorch.semantic.pretrained import open_encoder
        from audiolm_pytorch.training.distributed import create_accelerator

        accelerator = create_accelerator()
        device = accelerator.device if self.device == "auto" else device_named(self.device)
        settings = {name: getattr(self, name) for name in ("layer", "num_clusters", "seconds", "max_tokens", "seed")}
        trainer = KMeansTrainer(
            encoder=open_encoder(**self.source_of(self.encoder)).to(device),
            folder=self.data,
            results_folder=self.out,
            accelerator=accelerator,
            **settings,
        )
        done_before = " (done before)" if trainer.is_finished else ""
        fit = trainer.train()
        if not accelerator.is_main_process:
            return 0
        usage, tokenizer = fit.usage, fit.tokenizer
        print(
            f"{usage.num_tokens:,} tokens: {usage.used:,} of {usage.num_clusters:,} clusters used, perplexity "
            f"{usage.perplexity:.1f}, {100 * usage.explained:.1f}% of the variance explained{done_before}"
        )
        rate_hz = tokenizer.target_sample_hz / tokenizer.downsample_factor
        facts = f"layer {tokenizer.layer}, {rate_hz:g} tokens a second, fingerprint {tokenizer.fingerprint()}"
        print(printable(f"tokenizer in {self.out / 'tokenizer'}: {facts}"))
        if trainer.features_folder.is_dir():
            num_bytes = sum(file.stat().st_size for file in trainer.features_folder.rglob("*") if file.is_file())
            print(printable(f"{trainer.features_folder} ({num_bytes / 1e6:,.1f} MB) is no longer needed"))
        return 0
