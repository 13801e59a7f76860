"""Twenty steps of every trainer with the sizes of the preset `paper`, reduced only in depth, crops and batches.

`python tests/benchmarks/paper_sizes.py [--depth 2] [--steps 20] [--seconds 0.5]`, some minutes on a CPU. The whole
pipeline runs on eight short clips: all trainers, the fitted quantizer, token shards and the assembled model. For each
step the table has the trained parameters at the depth of the run and at the full depth, the time of the step, and the
peak memory of the process so far.
"""

import argparse
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from audiolm_pytorch.codecs.discriminators import soundstream_discriminators  # noqa: E402
from musiclm_pytorch.pipeline.builders import (  # noqa: E402
    build_codec,
    build_mulan,
    build_semantic_encoder,
    build_semantic_tokenizer,
    build_stage,
)
from musiclm_pytorch.pipeline.pipeline import Pipeline  # noqa: E402
from musiclm_pytorch.pipeline.presets import PRESETS, Preset  # noqa: E402
from tests.helpers.micro import write_clips  # noqa: E402

PARTS = ("codec", "semantic_tokenizer", "mulan", "semantic", "coarse", "fine")
# MusicLM, section 4: the stages, and w2v-BERT XL. The codec and the towers of MuLan are not counted in the papers.
PUBLISHED = {"semantic_tokenizer": 600e6, "semantic": 430e6, "coarse": 430e6, "fine": 430e6}


def reduced(preset: Preset, depth: int, steps: int, seconds: float) -> Preset:
    """Return a preset with fewer layers, short crops and small batches."""
    changes: dict[str, Any] = {}
    for name in PARTS:
        part = getattr(preset, name)
        # a contrastive loss needs two clips
        crops = {"batch_size": 2 if name == "mulan" else 1, "grad_accum_every": 1, "seconds": seconds}
        part = replace(part, run=replace(part.run, **crops, num_train_steps=steps, warmup_steps=1))
        sizes = {"depth": depth, "layer": min(depth, 2)} if name == "semantic_tokenizer" else {"depth": depth}
        changes[name] = replace(part, **sizes) if name != "codec" else part
    return replace(preset, **changes)


def parameters(preset: Preset) -> dict[str, int]:
    """Count the trained parameters of every step; stages include their table of condition embeddings."""
    shallow = replace(preset, semantic_tokenizer=replace(preset.semantic_tokenizer, depth=1, layer=1))
    codec, tokenizer = build_codec(preset), build_semantic_tokenizer(shallow)
    with torch.device("meta"):
        modules: dict[str, list[torch.nn.Module]] = {
            "codec": [codec, *([soundstream_discriminators()] if preset.codec.adversarial else [])],
            "semantic_tokenizer": [build_semantic_encoder(preset)],
            "mulan": [build_mulan(preset, ["a caption"])],
        }
        modules |= {stage: [build_stage(preset, stage, codec=codec, tokenizer=tokenizer)] for stage in PARTS[3:]}
    counts = {name: sum(one.numel() for part in parts for one in part.parameters()) for name, parts in modules.items()}
    for stage in PARTS[3:]:
        counts[stage] += preset.quantizer.num_quantizers * preset.quantizer.codebook_size * getattr(preset, stage).dim
    return counts


def main() -> None:
    """Run the pipeline and print a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of all crops")
    options = parser.parse_args()
    preset = reduced(PRESETS[options.preset], options.depth, options.steps, options.seconds)
    counts, full = parameters(preset), parameters(PRESETS[options.preset])
    print(f"{'step':20}{'parameters':>13}{'full depth':>13}{'published':>11}{'seconds':>9}{'peak GB':>9}  metrics")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(preset, data=write_clips(Path(folder) / "clips", 8), out=Path(folder) / "run")
        for report in pipeline.run():
            name = report.step.replace("-", "_")
            sizes = [f"{part[name] / 1e6:.1f} M" if name in part else "" for part in (counts, full, PUBLISHED)]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            cells = f"{sizes[0]:>13}{sizes[1]:>13}{sizes[2]:>11}{report.seconds:9.1f}{peak:9.2f}"
            print(f"{report.step:20}{cells}  {report.summary}", flush=True)
        print(f"the assembled model is complete: {pipeline.is_complete}")


if __name__ == "__main__":
    main()
