"""Memorisation by the protocol of MusicLM (arXiv:2301.11325, sec. 5): greedy continuations of training clips.

Run as `python -m musiclm_pytorch.recipes.metrics.continuations --model DIR --data CORPUS --out continuations.json`.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import tyro
from torch import Tensor

from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.generation.sampling import SamplingSettings
from audiolm_pytorch.generation.wrappers import SemanticTransformerWrapper
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import extract, extract_waves
from musiclm_pytorch.evaluation.metrics.memorisation import SemanticTokens, matching_cost
from musiclm_pytorch.evaluation.report import MetricValue, markdown_table, write_report

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["main", "match_metrics", "greedy_continuations"]

logger = logger_named(__name__)

# Share of exchanged pairs whose cost is below the threshold of approximate matches (MusicLM: less than 0.01%).
_FALSE_MATCHES = 1e-4


@torch.no_grad()
def greedy_continuations(
    model: "MusicLM", items: Sequence[AudioItem], prompt_seconds: float, seconds: float, batch_size: int = 16
) -> tuple[list[Tensor], list[Tensor]]:
    """Continue the semantic tokens of clips greedily, conditioned on the MuLan codes of the clips.

    Returns:
        The tokens after the prompt, as generated and as in the clips.
    """
    stage, quantizer = model.audio_lm.semantic_transformer, model.mulan_embed_quantizer
    extractor, mulan = SemanticTokens(model.audio_lm.wav2vec), JointEmbedder(quantizer.mulan, "MuLan")
    num_prompt = round(prompt_seconds / extractor.seconds_per_token)
    wrapper = SemanticTransformerWrapper(transformer=stage)
    generated: list[Tensor] = []
    expected: list[Tensor] = []
    for first in range(0, len(items), batch_size):
        part = items[first : first + batch_size]
        logger.info("clip %d of %d", first + 1, len(items))
        waves = load_clips(part, extractor.sample_hz, seconds)
        tokens = torch.stack(extract_waves(waves, extractor.sample_hz, [extractor])[extractor.name])
        latents = torch.stack(extract(part, [mulan], seconds)[mulan.name]).to(stage.device)
        codes = quantizer.codes_from_latents(latents, "audio")
        sampled = wrapper.generate(
            tokens.shape[1],
            streams={"semantic": tokens[:, :num_prompt, None].to(stage.device)},
            conditioning={"codes": quantizer.conditioning(codes=codes, namespace="semantic")},
            settings=SamplingSettings(temperature=0, guidance_scale=1.0),
        )
        generated += list(sampled.streams["semantic"][:, num_prompt:, 0].cpu())
        expected += list(tokens[:, num_prompt:])
    return generated, expected


def match_metrics(name: str, generated: list[Tensor], expected: list[Tensor], centroids: Tensor) -> list[MetricValue]:
    """Measure the share of continuations that equal their clip, and that match it approximately.

    The threshold of approximate matches is the cost that 0.01% of the continuations with exchanged clips fall below.
    """
    distances = torch.cdist(centroids, centroids).numpy()
    is_equal = [bool(torch.equal(a, b)) for a, b in zip(generated, expected)]
    costs = np.array([[matching_cost(a, b, distances) for b in expected] for a in generated])
    others = costs[~np.eye(len(costs), dtype=bool)]
    threshold = float(np.quantile(others, _FALSE_MATCHES)) if len(others) else 0.0
    note = f"cost below {threshold:.2f}, {len(others)} exchanged pairs"
    return [
        MetricValue.mean(f"{name} / exact matches", np.array(is_equal), 0.0),
        MetricValue.mean(f"{name} / approximate matches", costs.diagonal() < threshold, _FALSE_MATCHES, note),
        MetricValue.mean(
            f"{name} / cost of the own clip", costs.diagonal(), float(others.mean()) if len(others) else None
        ),
    ]


def main(
    model: str,
    data: Path,
    out: Path = Path("continuations.json"),
    prompt_seconds: tuple[float, ...] = (0.4, 1.0, 2.0),
    seconds: float = 5.0,
    limit: int = 100,
    device: str = "cpu",
) -> None:
    """Measure how often a MusicLM continues training clips, and held-out clips for comparison, as they were.

    Args:
        model: Folder of a MusicLM, or name of a bundled MusicLM.
        data: Folder of the clips that the model was trained on, with manifests train.jsonl and valid.jsonl.
        out: JSON file for the values; the table is written to a file with the suffix .md.
        prompt_seconds: Lengths of the prompts.
        seconds: Length of prompt and continuation.
        limit: Number of clips of each manifest.
        device: Device on which the model runs.
    """
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = MusicLM.from_pretrained(model, device=device)
    centroids = getattr(musiclm.audio_lm.wav2vec, "centroids", None)
    if centroids is None:
        raise ValueError("the semantic tokenizer has no centroids; approximate matches need a KMeansTokenizer")
    values: list[MetricValue] = []
    for name in ("train", "valid"):
        items = load_items(data / f"{name}.jsonl").items[:limit]
        for length in prompt_seconds:
            pairs = greedy_continuations(musiclm, items, length, seconds)
            values += match_metrics(f"{name} / prompt of {length:g} s", *pairs, centroids.detach().float().cpu())
    settings = {"model": model, "model_fingerprint": fingerprint_of(musiclm), "data": str(data), "seconds": seconds}
    write_report(out, values, settings)
    sys.stdout.write(markdown_table(values))


if __name__ == "__main__":
    tyro.cli(main)
