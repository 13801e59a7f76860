"""Where a MusicLM loses the beat: strength, tempo and onsets after every link of the chain from a clip to a caption.

Run as `python -m musiclm_pytorch.recipes.metrics.beat_chain --model tiny --data TUNES --out beat.json`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
from einops import rearrange
from torch import Tensor

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.conditioning.base import Conditions, guide
from audiolm_pytorch.data.manifest import AudioItem, load_items
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.generation.sampling import SamplingSettings, sample_tokens
from audiolm_pytorch.generation.wrappers import FineTransformerWrapper
from audiolm_pytorch.lm.stage_transformer import AudioTokens, StageTransformer
from audiolm_pytorch.lm.tokenizing import tokenize
from audiolm_pytorch.nn.module_state import eval_mode
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.text import logger_named
from musiclm_pytorch.evaluation.clips import load_clips
from musiclm_pytorch.evaluation.metric import ClipSet, evaluate, extract_waves
from musiclm_pytorch.evaluation.metrics.beat import Beat
from musiclm_pytorch.evaluation.music import comparison_table
from musiclm_pytorch.evaluation.report import MetricValue, write_report

if TYPE_CHECKING:
    from musiclm_pytorch.musiclm import MusicLM

__all__ = ["chain_waves", "main", "measure_chain", "teacher_forced_samples"]

logger = logger_named(__name__)


@torch.no_grad()
def teacher_forced_samples(
    stage: StageTransformer, tokens: AudioTokens, conditions: Conditions, settings: SamplingSettings, seed: int = 0
) -> Tensor:
    """Sample every token of a stage with one predicted stream, given the *real* tokens before it.

    Args:
        tokens: Real tokens of b clips of equal length, without padding.
        conditions: Conditions of the clips by name.
        settings: Temperature, guidance and so on of the stage.

    Returns:
        Sampled tokens `[b, f, levels]` of the predicted stream.
    """
    layout, stream = stage.layout, stage.layout.predicted[0]
    packed = stage.packed(tokens)
    ids, batch = packed.ids.clone(), len(packed.ids)
    hidden = stage.hidden(ids[:, :-1], packed.input_mask[:, :-1], stage.fuse(conditions, batch))
    unguided = None
    if settings.guidance_scale != 1:
        dropped = layout.without_conditions(packed, torch.ones(batch, dtype=torch.bool))
        unguided = stage.hidden(dropped.ids[:, :-1], dropped.input_mask[:, :-1], stage.fuse(None, batch))
    generator = torch.Generator().manual_seed(seed)
    targets = packed.ids[:, 1:]
    for number, head in enumerate(layout.heads):
        is_own = packed.loss_mask[:, 1:] & (targets >= head.first_id) & (targets < head.first_id + stream.vocab_size)
        item, row, column = is_own.nonzero(as_tuple=True)
        logits = stage.logits(hidden[item, row], number)
        if unguided is not None:
            logits = guide(logits, stage.logits(unguided[item, row], number), float(settings.guidance_scale))
        logits = logits[:, : stream.vocab_size]  # without the end token
        noise = torch.rand(len(logits), generator=generator).to(logits.device)
        ids[item, row + 1, column] = head.first_id + sample_tokens(logits, noise, settings)
    _, lengths = stage.streams_of(tokens)
    return layout.unpack(ids, lengths)[stream.name]


@dataclass(frozen=True)
class _Real:
    """Tokens of real clips, and the conditions of their captions for every stage."""

    tokens: AudioTokens
    conditions: dict[str, Conditions]
    seeds: list[int]


def chain_waves(model: "MusicLM", waves: Tensor, captions: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
    """Generate one wave `[b, n]` per clip for every link of the chain, at the sample rate of the model.

    Args:
        waves: Real clips `[b, n]` at the sample rate of the model.
        captions: Captions of the clips.
        seed: Seed of the first clip; clip i has the seed `seed + i`.
    """
    audio_lm, quantizer = model.audio_lm, model.mulan_embed_quantizer
    codec, device = audio_lm.codec, audio_lm.device
    semantic_hz = audio_lm.wav2vec.target_sample_hz
    inputs = {"acoustic": waves.to(device), "semantic": resample(waves, model.sample_hz, semantic_hz).to(device)}
    lengths = {kind: torch.full((len(wave),), wave.shape[1]) for kind, wave in inputs.items()}
    codes = quantizer.codes(texts=list(captions))
    with eval_mode(model), torch.no_grad():
        tokens = AudioTokens(tokenize(inputs, lengths, audio_lm.wav2vec, codec).tokens, {})
        conditions: dict[str, Conditions] = {
            name: {"codes": quantizer.conditioning(codes=codes, namespace=name)} if name in model.conditioned else {}
            for name in audio_lm.stages
        }
        real = _Real(tokens, conditions, [seed + number for number in range(len(waves))])
        acoustic = tokens.tokens["acoustic"]
        stages = (audio_lm.coarse_transformer, audio_lm.fine_transformer)
        num_levels = sum(stage.layout.predicted[0].num_levels for stage in stages if stage is not None)
        num_coarse = audio_lm.coarse_transformer.layout.predicted[0].num_levels

        def decoded(ids: Tensor) -> Tensor:
            parts = [codec.decode_from_codebook_indices(row[None], waves.shape[1]) for row in ids]
            return rearrange(torch.cat(parts), "b 1 n -> b n").float().cpu()

        links = {}
        for count in sorted({num_levels, num_coarse, 1}, reverse=True):
            links[f"codec copy, {count} level{'s' if count > 1 else ''}"] = decoded(acoustic[..., :count])
        coarse = teacher_forced_samples(
            audio_lm.coarse_transformer, tokens, conditions["coarse"], audio_lm.sampling["coarse"], seed
        )
        links["coarse codes sampled given the real past"] = decoded(coarse)
        links["real coarse codes, fine generated"] = decoded(_fine_codes(model, real, acoustic[..., :num_coarse]))
        for name, semantic in (("real semantic tokens", tokens.tokens["semantic"]), ("captions", None)):
            request = GenerationRequest(
                batch_size=len(waves),
                seconds=waves.shape[1] / model.sample_hz,
                conditioning={stage: part for stage, part in conditions.items() if part},
                semantic_tokens=semantic,
                allow_eos=False,
                seeds=real.seeds,
            )
            links[name] = audio_lm.generate(request).wave.float().cpu()
    return links


def _fine_codes(model: "MusicLM", real: _Real, coarse: Tensor) -> Tensor:
    """Generate fine codes for real coarse codes `[b, f, levels]`; return all, or `coarse` without a fine stage."""
    fine = model.audio_lm.fine_transformer
    if fine is None:
        return coarse
    streams, _ = fine.streams_of(real.tokens, tuple(stream.name for stream in fine.layout.inputs))
    sampled = FineTransformerWrapper(transformer=fine).generate(
        coarse.shape[1],
        streams=streams,
        conditioning=real.conditions["fine"] or None,
        settings=model.audio_lm.sampling["fine"],
        seeds=real.seeds,
    )
    return torch.cat([coarse, sampled.streams[fine.layout.predicted[0].name]], dim=-1)


def measure_chain(
    model: "MusicLM", items: Sequence[AudioItem], seconds: float = 5.0, seed: int = 0, batch_size: int = 16
) -> list[MetricValue]:
    """Measure beat strength, tempo and how well onsets follow the real clips, after every link."""
    metric = Beat()
    envelope = metric.extractor
    features: dict[str, list[Tensor]] = {}
    for first in range(0, len(items), batch_size):
        part = items[first : first + batch_size]
        logger.info("clip %d of %d", first + 1, len(items))
        waves = load_clips(part, model.sample_hz, seconds)
        links = chain_waves(model, waves, [item.caption or "" for item in part], seed + first)
        for name, made in {"real clips": waves, **links}.items():
            features.setdefault(name, []).extend(extract_waves(made, model.sample_hz, [envelope])[envelope.name])
    indices = list(range(len(items)))
    sets = [ClipSet(name, list(items), {envelope.name: rows}, indices) for name, rows in features.items()]
    real = replace(sets[0], references=None)
    return evaluate([metric], sets[1:], real)[0]


def main(
    model: str,
    data: Path,
    out: Path = Path("beat.json"),
    limit: int = 32,
    seconds: float = 5.0,
    seed: int = 0,
    batch_size: int = 16,
    device: str = "cpu",
) -> None:
    """Measure the beat after every link of the chain, and write JSON and a Markdown table.

    Args:
        model: Folder of a MusicLM, or name of a bundled MusicLM.
        data: Folder with a manifest valid.jsonl of real clips with captions, and tempi in the field `bpm`.
        out: JSON file for the values; the table is written to a file with the suffix .md.
        limit: Number of clips.
        seconds: Length of the clips.
        seed: Seed of the first clip.
        batch_size: Clips per batch.
        device: Device on which the model runs.
    """
    from musiclm_pytorch.musiclm import MusicLM

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    musiclm = MusicLM.from_pretrained(model, device=device)
    items = [item for item in load_items(data / "valid.jsonl").items if item.caption][:limit]
    values = measure_chain(musiclm, items, seconds, seed, batch_size)
    table = comparison_table(values)
    settings = {"model": model, "model_fingerprint": fingerprint_of(musiclm), "seconds": seconds, "seed": seed}
    write_report(out, values, settings, table)
    sys.stdout.write(table)


if __name__ == "__main__":
    tyro.cli(main)
