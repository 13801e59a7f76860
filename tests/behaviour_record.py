"""Write down what the packages do today, so that a refactoring can be held against it.

    python tests/behaviour_record.py write FOLDER [--only SECTION ...]
    python tests/behaviour_record.py compare FOLDER OTHER_FOLDER

`write` runs every section and writes FOLDER/<section>.safetensors, and FOLDER/<section>.json for numbers and texts.
`compare` lists differences and exits with 1 if there are any. Tokens and codes must be equal. Floats may differ by
1e-5, relative to values above 1. What is near but not equal is listed apart. Tensors that have other names but equal
values are listed as renamed. Names of metrics must be the same.

Sections import the packages at their top, so that a renaming needs one edit in each.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOLERANCE = 1e-5
TEXTS = ["a slow sad piano piece", "fast drums and a loud electric guitar", "a calm flute"]


# Sounds and small models that sections share.


def sound(seconds: float, hz: int = 16000, kind: int = 0) -> Tensor:
    """A wave `[n]`: of kind 0 a decaying chord, of kind 1 a rising chirp, of kind 2 noise."""
    moment = torch.arange(round(seconds * hz), dtype=torch.float64) / hz
    noise = torch.randn(len(moment), generator=torch.Generator().manual_seed(kind), dtype=torch.float64)
    chord = sum(torch.sin(2 * torch.pi * pitch * moment) for pitch in (220, 277.18, 329.63)) / 6
    waves = [chord * torch.exp(-2 * (moment % 0.5)), 0.4 * torch.sin(2 * torch.pi * (150 + 300 * moment) * moment)]
    return ([*waves, 0.1 * noise][kind] + 0.005 * noise).float()


def sounds(seconds: float, hz: int = 16000) -> Tensor:
    """One wave of every kind, `[3, n]`."""
    return torch.stack([sound(seconds, hz, kind) for kind in range(3)])


def write_clips(folder: Path, hz: int = 16000, count: int = 12) -> Path:
    """Captioned tones of about a second in files, of which the last four are held out."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        pitch, noise = 180 * 1.25**number, np.random.default_rng(number).standard_normal(hz + 800 * number)
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(len(noise)) / hz) + 0.02 * noise
        soundfile.write(folder / f"{number}.wav", wave, hz)
        labels = {"register": "low" if number % 2 else "high", "captions": [f"take {number}", "a test sound"]}
        rows.append(json.dumps({"audio": f"{number}.wav", "caption": f"a tone of {pitch:.0f} hertz", **labels}))
    (folder / "train.jsonl").write_text("\n".join(rows[:-4]))
    (folder / "valid.jsonl").write_text("\n".join(rows[-4:]))
    return folder


def tiny_mulan(**changes):
    """A MuLaN at 8 kHz with windows of half a second."""
    from musiclm_pytorch import AudioSpectrogramTransformer, MuLaN, TextTransformer

    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16}
    audio = AudioSpectrogramTransformer(**sizes, patch_size=8, sample_hz=8000, num_mels=24, spec_n_fft=256)
    text = TextTransformer(**sizes, num_tokens=256)
    windows = {"window_seconds": 0.5, "window_stride_seconds": 0.25}
    return MuLaN(audio_transformer=audio, text_transformer=text, dim_latent=16, **windows, **changes).eval()


def tiny_conditioner(fitted: bool = True):
    """A quantizer of two levels of four codes over `tiny_mulan`."""
    from musiclm_pytorch import MuLaNEmbedQuantizer

    sizes = {"conditioning_dims": (8, 8, 8), "namespaces": ("semantic", "coarse", "fine")}
    quantizer = MuLaNEmbedQuantizer(mulan=tiny_mulan(), **sizes, rq_num_quantizers=2, codebook_size=4)
    if fitted:
        quantizer.fit(torch.nn.functional.normalize(torch.randn(40, 16), dim=-1))
    return quantizer


def tiny_codec(**changes):
    """A causal SoundStream of two levels of 16 codes."""
    from audiolm_pytorch import SoundStream

    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "rq_num_quantizers": 2, "codebook_dim": 16, "channels": 4, "strides": (4, 4, 5)}
    return SoundStream(**sizes, **changes)


def tiny_stages(semantic_vocab: int = 1024, codec_vocab: int = 1024, only: str = "", **changes):
    """The three stages by name, or one alone, for codes of two coarse and two fine levels."""
    from audiolm_pytorch import CoarseTransformer, FineTransformer, SemanticTransformer

    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "ff_mult": 2.0, **changes}
    coarse = {"codebook_size": codec_vocab, "num_coarse_quantizers": 2}
    makers = {
        "semantic": lambda: SemanticTransformer(num_semantic_tokens=semantic_vocab, **sizes),
        "coarse": lambda: CoarseTransformer(num_semantic_tokens=semantic_vocab, **coarse, **sizes),
        "fine": lambda: FineTransformer(num_fine_quantizers=2, **coarse, **sizes),
    }
    return makers[only]() if only else {name: make() for name, make in makers.items()}


def letter_conditioner():
    """A text encoder whose states are the letters of a text."""
    from audiolm_pytorch import ConditionTensor
    from audiolm_pytorch.conditioning.base import TextEncoder

    class LetterConditioner(TextEncoder):
        dim = 6

        def fingerprint(self):
            return "letters"

        def forward(self, texts):
            texts = [texts] if isinstance(texts, str) else list(texts)
            states = torch.zeros(len(texts), max(map(len, texts)), self.dim)
            for row, text in zip(states, texts):
                row[: len(text)] = torch.tensor([[ord(letter) % (7 + i) / 7 for i in range(6)] for letter in text])
            is_real = torch.arange(states.shape[1]) < torch.tensor([[len(text)] for text in texts])
            return ConditionTensor(states, is_real)

    return LetterConditioner()


def logits_of(stage, tokens, conditions) -> list[Tensor]:
    """Logits of every head; the only place that knows the parts of a stage."""
    packed = stage.packed(tokens)
    hidden = stage.hidden(packed.ids, packed.input_mask, stage.fuse(conditions, len(packed.ids)))
    return [stage.logits(hidden, head) for head in range(len(stage.heads))]


def of_audio(name: str, made) -> dict[str, Tensor]:
    """What one call, or one step of a stream, generated."""
    kinds = {kind: getattr(made, kind) for kind in ("semantic", "semantic_lengths", "acoustic", "acoustic_lengths")}
    waves = {f"wave{item}": wave for item, wave in enumerate(made.waves)}
    return {f"{name}.{kind}": tensor for kind, tensor in {**kinds, **waves}.items()}


def of_candidates(name: str, found) -> dict[str, Tensor]:
    """Candidates of MusicLM."""
    return {f"{name}.{kind}": getattr(found, kind) for kind in ("waves", "scores", "order", "best")}


def of_run(trainer, folder: Path) -> dict:
    """Train, and collect all weights and the rows of metrics of a run without the clock."""
    trainer.train()
    return {**of_files(folder), "rows": rows_of(folder)}


def of_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files below a folder."""
    files = {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    return {f"{path}:{name}": tensor for path, tensors in files.items() for name, tensor in tensors.items()}


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


RUN = {"num_train_steps": 8, "batch_size": 2, "warmup_steps": 2, "learning_rate": 3e-3, "ema_decay": 0.9}
RUN |= {"log_every": 1, "validate_every": 4}
CODES = {"audio_text_condition": True, "cond_dim": 8}


# At this temperature the first item ends after 29 tokens, the second one after 38, the third one not at all.
MAY_END = {"seeds": [47, 31, 0], "seconds": 3.0, "allow_eos": True, "sampling": {"semantic": {"temperature": 1.6}}}


# Sections.


def generate(_: Path) -> dict:
    from audiolm_pytorch import GenerationRequest
    from musiclm_pytorch import MusicLM

    model = MusicLM.from_pretrained("tiny")
    audio_lm = model.audio_lm
    found = of_candidates("musiclm", model(TEXTS[:2], num_samples=4, seconds=2.0, seed=0, return_all=True))
    settings = {"seconds": 1.0, "num_samples": 2, "seeds": [5, 2], "return_all": True}
    found |= of_candidates("musiclm.levels", model(TEXTS[2], num_levels=3, max_batch=1, **settings))
    plain = audio_lm.generate(GenerationRequest(batch_size=2, seconds=2.0, seeds=[3, 8]))
    found |= of_audio("unconditional", plain)
    given = {"semantic_tokens": plain.semantic, "semantic_lengths": torch.tensor([40, 23]), "seeds": 4}
    found |= of_audio("semantic_given", audio_lm.generate(GenerationRequest(**given)))
    found |= of_audio(
        "coarse_only", audio_lm.generate(GenerationRequest(seconds=1.5, coarse_only=True, text=TEXTS[0], seeds=1))
    )
    sampling = {"semantic": {"temperature": 0.8, "top_k": 50, "guidance_scale": 2.0}}
    sampling |= {"coarse": {"top_p": 0.9, "guidance_scale": 1.5}, "fine": {"temperature": 0}}
    found |= of_audio(
        "guided", audio_lm.generate(GenerationRequest(text=TEXTS, seconds=1.5, seeds=6, sampling=sampling))
    )
    found |= of_audio("heard", audio_lm.generate(GenerationRequest(wavs=sounds(2.0)[:2], seconds=1.0, seeds=2)))
    found |= of_audio("may_end", audio_lm.generate(GenerationRequest(**MAY_END)))
    torch.manual_seed(11)
    return found | of_audio("without_seeds", audio_lm.generate(GenerationRequest(seconds=0.5)))


def stream(_: Path) -> dict:
    from audiolm_pytorch import GenerationRequest
    from musiclm_pytorch import MusicLM

    audio_lm = MusicLM.from_pretrained("tiny").audio_lm
    requests = {
        "plain": {"batch_size": 2, "seconds": 2.6, "seeds": [3, 8], "chunk_seconds": 0.5},
        "text": {"text": TEXTS[0], "seconds": 1.5, "seeds": 1, "chunk_seconds": 0.3},
        "prime": {"prime_wave": [sound(0.9), sound(0.4, kind=1)], "seconds": 1.5, "seeds": 1},
        "may_end": {**MAY_END, "chunk_seconds": 0.7},
    }
    found = {}
    for name, request in requests.items():
        chunk_seconds = request.pop("chunk_seconds", 1.0)
        chunks = list(audio_lm.stream(GenerationRequest(**request), chunk_seconds=chunk_seconds))
        for number, chunk in enumerate(chunks):
            found |= of_audio(f"{name}.chunk{number}", chunk)
        lengths = [[wave.shape[-1] for wave in chunk.waves] for chunk in chunks]
        found[f"{name}.chunk_lengths"] = torch.tensor(lengths)
    return found


def continuation(_: Path) -> dict:
    """Longer than the windows of the bundled stages, which are 5, 5 and 2 s."""
    from audiolm_pytorch import GenerationRequest
    from musiclm_pytorch import MusicLM

    model = MusicLM.from_pretrained("tiny")
    primes = [sound(1.3), sound(0.72, kind=1)]
    settings = {"num_samples": 1, "seed": 0, "return_all": True, "prime_wave": primes}
    found = of_candidates("musiclm", model(TEXTS[:2], seconds=5.7, **settings))
    padded = torch.nn.utils.rnn.pad_sequence(primes, batch_first=True)
    lengths = {"prime_lengths": torch.tensor([len(prime) for prime in primes])}
    found |= of_audio(
        "padded", model.audio_lm.generate(GenerationRequest(prime_wave=padded, **lengths, seconds=2.5, seeds=[1, 9]))
    )
    other = {"prime_wave": sound(0.8, 44100), "prime_wave_input_sample_hz": 44100}
    return found | of_audio("other_rate", model.audio_lm.generate(GenerationRequest(**other, seconds=5.7, seeds=2)))


def latents(_: Path) -> dict:
    from musiclm_pytorch import MusicLM

    quantizer = MusicLM.from_pretrained("tiny").mulan_embed_quantizer
    mulan, waves, lengths = quantizer.mulan, sounds(3.0), torch.tensor([48000, 31000, 9000])
    long_lengths = torch.tensor([200000, 176000, 90000])
    with torch.no_grad():
        found = {
            "texts": mulan.get_text_latents(TEXTS),
            "audio": mulan.get_audio_latents(waves),
            "audio.lengths": mulan.get_audio_latents(waves, lengths),
            "audio.long": mulan.get_long_audio_latents(sounds(12.5), long_lengths),
            "audio.windows": mulan.window_latents(sound(12.5)),
            "codes.texts": quantizer.codes(texts=TEXTS),
            "codes.waves": quantizer.codes(wavs=waves, lengths=lengths),
        }
        for name in quantizer.namespaces:
            found[f"{name}.texts"] = quantizer.conditioning(texts=TEXTS, namespace=name).embeddings
            found[f"{name}.waves"] = quantizer.conditioning(wavs=waves, namespace=name).embeddings
    return found


def codec(_: Path) -> dict:
    from musiclm_pytorch import Codec

    def of_codec(name, codec, waves, lengths, piece):
        codes = codec.tokenize(waves)
        found = {"codes": codes, "codes.lengths": codec.tokenize(waves, lengths)}
        found |= {f"codes.short{n}": codec.tokenize(waves[..., :n]) for n in (1, 1000, 4321)}
        found |= {"wave": codec.decode_from_codebook_indices(codes, waves.shape[-1])}
        found |= {"wave.coarse": codec.decode_from_codebook_indices(codes[..., : codes.shape[-1] // 2])}
        coder, decoder = codec.encoder_stream(), codec.decoder_stream()
        parts = [coder.push(part) for part in waves.split(piece, dim=-1)] + [coder.finish()]
        heard = [decoder.push(part) for part in codes.split(7, dim=1)] + [decoder.finish()]
        found |= {"stream.codes": torch.cat(parts, dim=1), "stream.wave": torch.cat(heard, dim=-1)}
        found |= {"stream.codes.counts": torch.tensor([part.shape[1] for part in parts])}
        found |= {"stream.wave.counts": torch.tensor([part.shape[-1] for part in heard])}
        return {f"{name}.{kind}": tensor for kind, tensor in found.items()}

    lengths = torch.tensor([24000, 17001, 5000])
    found = of_codec("bundled", Codec.from_pretrained("codec_16khz"), sounds(1.5), lengths, 1100)
    kinds = {
        "rvq": {},
        "lfq": {"use_lookup_free_quantizer": True},
        "fsq": {"use_finite_scalar_quantizer": True},
        "groups": {"rq_groups": 2},
        "attention": {"attn_depth": 1, "attn_window_size": 8},
        "stereo": {"audio_channels": 2},
    }
    for name, changes in kinds.items():
        made, waves = tiny_codec(**changes).eval(), sounds(0.5)
        waves = torch.stack([waves, waves.flip(0)], dim=1) if "audio_channels" in changes else waves
        found |= of_codec(name, made, waves, torch.tensor([8000, 6001, 700]), 333)
        out = made.train()(waves)
        sum_of_all = out.wave.square().mean() + out.commitment_loss
        sum_of_all.backward()
        norms = [p.grad.norm() for p in made.parameters() if p.grad is not None]
        found |= {f"{name}.train.wave": out.wave, f"{name}.train.codes": out.codes, f"{name}.train.frames": out.frames}
        found |= {f"{name}.train.commitment": out.commitment_loss, f"{name}.train.grad": torch.stack(norms).norm()}
    return found


def semantic(_: Path) -> dict:
    from musiclm_pytorch import SemanticTokenizer

    tokenizer = SemanticTokenizer.from_pretrained("semantic_16khz")
    found = {f"ids.{seconds}": tokenizer(sounds(seconds)) for seconds in (0.3, 2.0, 6.3)}
    found["ids.44100"] = tokenizer(sounds(2.0, 44100), input_sample_hz=44100)
    found["ids.lengths"] = tokenizer(sounds(2.0), lengths=torch.tensor([32000, 20001, 3000]))
    lengths = torch.tensor([88200, 50001, 9000])
    found["ids.44100.lengths"] = tokenizer(sounds(2.0, 44100), input_sample_hz=44100, lengths=lengths)
    features, _ = tokenizer.encoder.features(sounds(2.0), layer=tokenizer.layer)
    found["vectors"] = (features - tokenizer.mean) / tokenizer.std
    return found


def train_codec(folder: Path) -> dict:
    from audiolm_pytorch import SoundStreamTrainer, SpectralSoundStream

    sizes = {"dim": 16, "encoder_depth": 1, "decoder_depth": 1, "codebook_size": 16, "code_dim": 8}
    made = SpectralSoundStream(**sizes, rq_num_quantizers=2)
    data = {"folder": write_clips(folder / "data"), "data_max_length": 6400, "results_folder": folder / "run"}
    return of_run(SoundStreamTrainer(made, **data, **RUN, unquantized_steps=2), folder / "run")


def train_codec_discriminators(folder: Path) -> dict:
    from audiolm_pytorch import SoundStreamTrainer
    from audiolm_pytorch.codecs.discriminators import soundstream_discriminators

    made, judges = tiny_codec(attn_depth=1), soundstream_discriminators(channels=1, width=8)
    data = {"folder": write_clips(folder / "data"), "data_max_length": 6400, "results_folder": folder / "run"}
    begin = {"unquantized_steps": 2, "adversarial_start_step": 2, "discriminator_lead_steps": 1}
    return of_run(SoundStreamTrainer(made, discriminators=judges, **data, **begin, **RUN), folder / "run")


def train_codec_denoising(folder: Path) -> dict:
    from audiolm_pytorch import SoundStreamTrainer
    from audiolm_pytorch.codecs import FiLM

    made = tiny_codec(denoising=FiLM(dim=16))
    data = {"folder": write_clips(folder / "data"), "data_max_length": 6400, "results_folder": folder / "run"}
    noise = {"noise_folder": write_clips(folder / "noise", 22050, count=6)}
    return of_run(SoundStreamTrainer(made, **data, **noise, **RUN, grad_accum_every=2), folder / "run")


def train_semantic(folder: Path) -> dict:
    from audiolm_pytorch import BestRQEncoder, SemanticTokenizerTrainer
    from audiolm_pytorch.semantic import BestRQ

    encoder = BestRQEncoder(dim=32, depth=2, heads=2, dim_head=16)
    objective = BestRQ(encoder, codebook_size=32, num_directions=16)
    data = {"folder": write_clips(folder / "data", 24000), "seconds": 0.8, "results_folder": folder / "run"}
    trainer = SemanticTokenizerTrainer(encoder=encoder, objective=objective, **data, **RUN)
    found = of_run(trainer, folder / "run")
    fit = trainer.fit_tokenizer(layer=1, num_clusters=12, results_folder=folder / "fit")
    ids, usage = fit.tokenizer(sounds(1.0)), {name: value for name, value in vars(fit.usage).items()}
    return found | of_files(folder / "fit" / "tokenizer") | {"ids": ids, "usage": usage}


def train_kmeans(folder: Path) -> dict:
    from audiolm_pytorch import KMeansTrainer, open_encoder

    data = {"folder": write_clips(folder / "data", 24000), "seconds": 1.0, "results_folder": folder / "run"}
    fit = KMeansTrainer(
        encoder=open_encoder("semantic_16khz"), layer=1, num_clusters=20, num_epochs=3, seed=3, **data
    ).train()
    parts = {name: getattr(fit.tokenizer, name) for name in ("centroids", "mean", "std")}
    return {**parts, "ids": fit.tokenizer(sounds(1.0)), "usage": dict(vars(fit.usage))}


def train_mulan(folder: Path) -> dict:
    from musiclm_pytorch import CaptionSampler, LayerContrast, MuLaNTrainer

    mulan = tiny_mulan(layer_contrast=LayerContrast(layers=((0, 1), (1, 1)), weight=0.5))
    data = {"folder": write_clips(folder / "data"), "seconds": 0.4, "results_folder": folder / "run"}
    texts = {"captions": CaptionSampler(captions_per_clip=2), "chunk_size": 3}
    return of_run(MuLaNTrainer(mulan=mulan, **data, **texts, **{**RUN, "batch_size": 4}), folder / "run")


def train_mulan_sigmoid(folder: Path) -> dict:
    from musiclm_pytorch import MuLaNTrainer, SigmoidContrastiveLearning

    mulan = tiny_mulan(loss=SigmoidContrastiveLearning())
    data = {"folder": write_clips(folder / "data"), "seconds": 0.4, "results_folder": folder / "run"}
    return of_run(MuLaNTrainer(mulan=mulan, **data, **{**RUN, "batch_size": 4}, labels=["register"]), folder / "run")


def train_quantizer(folder: Path) -> dict:
    from audiolm_pytorch.data import load_split
    from musiclm_pytorch.quantizer.fit import fit_quantizer

    train, valid = load_split(write_clips(folder / "data", count=16))
    found = {}
    for name, choices in {"ridge": {}, "windows": {"max_windows": 12}}.items():
        quantizer = tiny_conditioner(fitted=False)
        report = fit_quantizer(quantizer, train, held_out=valid, seed=2, **choices)
        buffers = {key: value for key, value in quantizer.state_dict().items() if not key.startswith("mulan.")}
        found |= {f"{name}.{key}": value for key, value in buffers.items()}
        found |= {f"{name}.codes": quantizer.codes(texts=TEXTS), f"{name}.figures": report.metrics}
    return found


def train_stages(folder: Path) -> dict:
    """Each stage on waves, conditioned by codes of sound and captions."""
    from audiolm_pytorch import (
        CoarseTransformerTrainer,
        Codec,
        FineTransformerTrainer,
        SemanticTokenizer,
        SemanticTransformerTrainer,
    )

    semantic, acoustic = (
        {"wav2vec": SemanticTokenizer.from_pretrained("semantic_16khz")},
        {"codec": Codec.from_pretrained("codec_16khz")},
    )
    from audiolm_pytorch.lm.task import StageObjective

    data = {"folder": write_clips(folder / "data"), "data_max_length_seconds": 0.6}
    plans = {
        "semantic": (SemanticTransformerTrainer, semantic, {"text_prob": 0.5}),
        "coarse": (CoarseTransformerTrainer, semantic | acoustic, {"precision": "bf16"}),
        "fine": (FineTransformerTrainer, acoustic, {"grad_accum_every": 2}),
    }
    found = {}
    for name, (trainer, parts, choices) in plans.items():
        stage = tiny_stages(only=name, **CODES, dropout=0.1, forget_prob=0.1, null_tokens=2)
        common = {
            "audio_conditioner": tiny_conditioner(),
            "results_folder": folder / name,
            "objective": StageObjective(level_drop_prob=0.3),
        }
        run = of_run(trainer(transformer=stage, **parts, **common, **data, **choices, **RUN), folder / name)
        found |= {f"{name}.{key}": value for key, value in run.items()}
    return found


def train_stages_text(folder: Path) -> dict:
    """The semantic stage on waves, conditioned by states of captions."""
    from audiolm_pytorch import SemanticTransformerTrainer
    from musiclm_pytorch import SemanticTokenizer

    data = {"folder": write_clips(folder / "data"), "data_max_length_seconds": 0.6}
    found = {}
    for name in ("cross", "prefix"):
        stage = tiny_stages(only="semantic", text_dim=6, text_as=name, cond_drop_prob=0.3)
        parts = {
            "wav2vec": SemanticTokenizer.from_pretrained("semantic_16khz"),
            "text_conditioner": letter_conditioner(),
        }
        trainer = SemanticTransformerTrainer(transformer=stage, **parts, **data, **RUN, results_folder=folder / name)
        found |= {f"{name}.{key}": value for key, value in of_run(trainer, folder / name).items()}
    return found


def train_stages_shards(folder: Path) -> dict:
    """The coarse stage on tokens and latents that were written before."""
    from audiolm_pytorch import CoarseTransformerTrainer
    from audiolm_pytorch.data import TokenShards, write_shards

    def record(index):
        frames, draws = 80 + 10 * index, np.random.default_rng(index)
        latents = draws.standard_normal((3, 16)).astype(np.float32)
        tokens = {"semantic": np.arange(frames // 2) % 12, "acoustic": draws.integers(0, 16, (frames, 4))}
        return {**tokens, "latents": latents, "duration_seconds": np.float32(frames / 50)}

    write_shards(folder / "shards", record, 6, {"made": "here"})
    stage = tiny_stages(12, 16, only="coarse", pattern="flat", positions="relative", **CODES, null_tokens=2)
    data = {"shards": TokenShards(folder / "shards"), "data_max_length_seconds": 0.8, "results_folder": folder / "run"}
    trainer = CoarseTransformerTrainer(transformer=stage, audio_conditioner=tiny_conditioner(), **data, **RUN)
    return of_run(trainer, folder / "run")


def layers(_: Path) -> dict:
    """Small stages of each kind, pattern, position and condition."""
    from audiolm_pytorch import (
        CoarseTransformerWrapper,
        ConditionTensor,
        FineTransformerWrapper,
        SemanticTransformerWrapper,
    )
    from audiolm_pytorch.generation.sampling import SamplingSettings
    from audiolm_pytorch.lm.stage_transformer import AudioTokens

    draws = torch.Generator().manual_seed(0)
    ids = {"semantic": torch.randint(12, (2, 5), generator=draws)}
    ids |= {"acoustic": torch.randint(16, (2, 10, 4), generator=draws)}
    tokens = AudioTokens(ids, {"semantic": torch.tensor([5, 4]), "acoustic": torch.tensor([10, 8])})
    kept = torch.tensor([[True, True, True], [True, True, False]])
    codes = ConditionTensor(torch.randn(2, 3, 8, generator=draws), kept)
    variants = {"none": ({}, None), "codes": (CODES, {"codes": codes})}
    for way in ("cross", "prefix"):
        said = {"codes": codes, "text": letter_conditioner().forward(["ab c", "longer text"])}
        variants[way] = ({**CODES, "text_dim": 6, "text_as": way}, said)
    plans = {
        f"{pattern}.{positions}.{condition}": ({"pattern": pattern, "positions": positions, **changes}, said)
        for pattern in ("flat", "delayed", "parallel")
        for positions in ("rotary", "relative")
        for condition, (changes, said) in variants.items()
    }
    plans |= {"one_kv_head": ({"kv_heads": 1}, None), "forgetful": ({"forget_prob": 0.3, "dropout": 0.2}, None)}
    wrappers = {
        "semantic": (SemanticTransformerWrapper, {}, 6),
        "coarse": (CoarseTransformerWrapper, {"semantic": ids["semantic"].unsqueeze(-1)}, 8),
        "fine": (FineTransformerWrapper, {"coarse": ids["acoustic"][..., :2]}, 8),
    }
    found = {}
    for plan, (changes, said) in plans.items():
        for kind, stage in tiny_stages(12, 16, cond_drop_prob=0.5, **changes).items():
            for parameter in stage.parameters():  # or logits would be near zero
                parameter.data.mul_(3)
            wrapper, given, frames = wrappers[kind]
            wrapped, out = wrapper(stage.eval()), {}
            loss = wrapped(tokens=tokens, conditioning=said)
            loss.loss.backward()
            norms = [p.grad.norm() for p in stage.parameters() if p.grad is not None]
            out |= {"loss": loss.loss, "accuracy": loss.accuracy, "grad": torch.stack(norms).norm()}
            out |= {f"loss.{name}": value for name, value in loss.per_stream.items()}
            with torch.no_grad():
                out |= {f"logits{head}": logits for head, logits in enumerate(logits_of(stage, tokens, said))}
                wrapped.train()
                for seed in range(3):  # in which items the condition is dropped differs
                    torch.manual_seed(seed)
                    out[f"loss.training{seed}"] = wrapped(tokens=tokens, conditioning=said).loss
                wrapped.eval()
            request = {"streams": given, "batch_size": 2, "conditioning": said, "seeds": [3, 4]}
            scale = 1.0 if said is None else 2.0
            ways = {"greedy": SamplingSettings(temperature=0)}
            ways |= {"sampled": SamplingSettings(temperature=0.9, top_k=8, top_p=0.95, guidance_scale=scale)}
            for way, settings in ways.items():
                made = wrapped.generate(frames, settings=settings, **request)
                out |= {f"{way}.{name}": stream for name, stream in made.streams.items()}
            if kind == "semantic":
                made = wrapped.generate(40, allow_eos=True, **request)
                out |= {"may_end": made.streams[kind], "may_end.lengths": made.lengths[kind]}
            found |= {f"{kind}.{plan}.{name}": value for name, value in out.items()}
    return found


def audio(_: Path) -> dict:
    """Losses of MuLaN, spectrograms, resampling and files."""
    from audiolm_pytorch.audio.files import peak_safe, read_audio, write_audio
    from audiolm_pytorch.audio.mel import MelSpectrogram
    from audiolm_pytorch.audio.resample import resample
    from musiclm_pytorch import SigmoidContrastiveLearning, SoftmaxContrastiveLearning

    found = {}
    losses = {"softmax": SoftmaxContrastiveLearning(), "decoupled": SoftmaxContrastiveLearning(decoupled=True)}
    losses["sigmoid"] = SigmoidContrastiveLearning()
    for name, loss in losses.items():
        mulan, lengths = tiny_mulan(loss=loss).train(), torch.tensor([3200, 2500, 1200])
        value = mulan(sounds(0.4, 8000), [*TEXTS, TEXTS[0]], lengths, clip_index=torch.tensor([0, 1, 2, 1]))
        value.backward()
        found[f"mulan.{name}.loss"] = value
        moved = {key: parameter for key, parameter in mulan.named_parameters() if parameter.grad is not None}
        found |= {f"mulan.{name}.grad.{key}": parameter.grad.norm() for key, parameter in moved.items()}
    waves = sounds(0.5)
    for power, center in ((1, True), (2, False)):
        mel = MelSpectrogram(sample_hz=16000, n_fft=512, hop_length=160, num_mels=40, power=power, center=center)
        found[f"mel.{power}"] = mel(waves)
    found |= {f"resample.{hz}": resample(waves, 16000, hz) for hz in (8000, 22050, 24000, 44100)}
    found["peak_safe"] = peak_safe(5 * waves)
    with tempfile.TemporaryDirectory() as folder:
        write_audio(Path(folder) / "a.wav", waves[:2], 16000)
        choices = {"channels": 1, "start_seconds": 0.1, "duration_seconds": 0.3}
        found["file"] = read_audio(Path(folder) / "a.wav", sample_hz=22050, **choices)[0]
    return found


SECTIONS = [generate, stream, continuation, latents, codec, semantic, layers, audio]
SECTIONS += [train_codec, train_codec_discriminators, train_codec_denoising, train_semantic, train_kmeans]
SECTIONS += [train_mulan, train_mulan_sigmoid, train_quantizer, train_stages, train_stages_text, train_stages_shards]


def write(folder: Path, only: list[str] | None) -> int:
    """Run sections and write what they give; a section that fails is told of, and the others still run."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for section in [one for one in SECTIONS if not only or one.__name__ in only]:
        torch.manual_seed(0)
        np.random.seed(0)
        start, name = time.perf_counter(), section.__name__
        try:
            with tempfile.TemporaryDirectory() as scratch:
                found = section(Path(scratch))
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        tensors = {key: one.detach().contiguous().clone() for key, one in found.items() if isinstance(one, Tensor)}
        others = {key: one for key, one in found.items() if not isinstance(one, Tensor)}
        save_file(tensors, folder / f"{name}.safetensors")
        if others:
            (folder / f"{name}.json").write_text(json.dumps(others, indent=1))
        size = (folder / f"{name}.safetensors").stat().st_size / 1e6
        print(f"{name:28s}{time.perf_counter() - start:7.1f} s {len(tensors):6d} tensors {size:7.2f} MB", flush=True)
    print("failed:", *failed) if failed else None
    return int(bool(failed))


# Comparison.


def leaves(value, name: str = "") -> dict:
    """Numbers and texts of nested data by their path."""
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for part, one in pairs for key, leaf in leaves(one, f"{name}/{part}").items()}
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {name: torch.tensor(float(value), dtype=torch.float64) if is_number else value}


def gap(one, other) -> float:
    """Largest difference, relative to values above 1; 0 = equal bit for bit, infinite = not to be compared."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return 0.0 if type(one) is type(other) and one == other else float("inf")
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else float("inf")
    one, other = one.double(), other.double()
    gaps = (one - other).abs() / one.abs().clamp(min=1)
    gaps[(one == other) | (one.isnan() & other.isnan())] = 0
    return float(gaps.nan_to_num(float("inf")).max()) if gaps.numel() else 0.0


def told(one, other) -> str:
    """How two values differ."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return f"{one!r} became {other!r}"
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {tuple(one.shape)} became {other.dtype} {tuple(other.shape)}"
    if one.is_floating_point():
        return f"differs by {gap(one, other):.2g}" + (f" ({one:.6g} became {other:.6g})" if one.ndim == 0 else "")
    return f"{int((one != other).sum())} of {one.numel()} numbers differ"


def compare_tensors(one: dict, other: dict, may_move: bool) -> tuple[list[str], list[str]]:
    """Faults and remarks; with `may_move`, tensors may also have exchanged their names."""
    faults, near, renamed = [], [], []
    gaps = {name: gap(one[name], other[name]) for name in one if name in other}
    near += [name for name, value in gaps.items() if 0 < value <= TOLERANCE]
    wrong = [name for name, value in gaps.items() if value > TOLERANCE]
    lost = [name for name in one if name not in other] + (wrong if may_move else [])
    new = [name for name in other if name not in one] + (wrong if may_move else [])
    by_shape: dict = {}
    for name in new:
        by_shape.setdefault(other[name].shape, []).append(name)
    for limit in (0.0, TOLERANCE):  # what is equal is found before what is near
        for name in list(lost):
            candidates = by_shape.get(one[name].shape, [])
            match = next((found for found in candidates if gap(one[name], other[found]) <= limit), None)
            if match is not None:
                lost.remove(name)
                new.remove(match)
                candidates.remove(match)
                renamed.append(f"{name} -> {match}{' (near)' if limit else ''}")
    still = set(lost) & set(new) if may_move else wrong
    faults += [f"{name}: {told(one[name], other[name])}" for name in still]
    faults += [f"{name}: missing" for name in lost if name not in still]
    faults += [f"{name}: extra" for name in new if name not in still]
    remarks = [f"renamed but equal: {len(renamed)}, such as"] * bool(renamed) + [f"  {line}" for line in renamed[:12]]
    if near:
        remarks.append(f"near, not equal: {len(near)}, at most {max(gaps[n] for n in near):.2g}, such as {near[0]}")
    return sorted(faults), remarks


def compare_leaves(one: dict, other: dict) -> tuple[list[str], list[str]]:
    """Faults and remarks of numbers and texts; names that several rows lack are told once."""
    faults, remarks = compare_tensors(
        {name: one[name] for name in one if name in other}, {name: other[name] for name in other if name in one}, False
    )
    for word, names in (("missing", set(one) - set(other)), ("extra", set(other) - set(one))):
        faults += [f"{name}: {word}" for name in sorted({re.sub(r"/\d+/", "/*/", name) for name in names})]
    return faults, remarks


def compare_sections(section: str, folder: Path, other: Path, other_section: str) -> tuple[list[str], list[str]]:
    """Faults and remarks of one section."""
    tensors = [load_file(at / f"{name}.safetensors") for at, name in ((folder, section), (other, other_section))]
    texts = []
    for path in (folder / f"{section}.json", other / f"{other_section}.json"):
        texts.append(leaves(json.loads(path.read_text())) if path.is_file() else {})
    results = compare_tensors(*tensors, may_move=section.startswith("train")), compare_leaves(*texts)
    return results[0][0] + results[1][0], results[0][1] + results[1][1]


def compare(folder: Path, other: Path) -> int:
    """Print what differs between two records; 1 if anything does."""
    here, there = ({path.stem for path in at.glob("*.safetensors")} for at in (folder, other))
    pairs, extra, num_faults = {name: name for name in here & there}, there - here, 0
    for name in sorted(here - there):  # was the whole section renamed?
        counts = {new: len(compare_sections(name, folder, other, new)[0]) for new in sorted(extra)}
        best = min(counts, key=counts.__getitem__, default=None)
        if best is not None and counts[best] < len(load_file(folder / f"{name}.safetensors")) / 2:
            pairs[name] = best
            extra.discard(best)
        else:
            print(f"{name}: missing in {other}")
            num_faults += 1
    for name in sorted(extra):
        print(f"{name}: extra in {other}")
        num_faults += 1
    for name in sorted(pairs):
        faults, remarks = compare_sections(name, folder, other, pairs[name])
        alias = "" if pairs[name] == name else f" (now {pairs[name]})"
        print(f"{name}{alias}: {f'{len(faults)} DIFFERENCES' if faults else 'the same'}")
        for line in [*(f"  ! {line}" for line in faults), *(f"    {line}" for line in remarks)]:
            print(line)
        num_faults += len(faults)
    print(f"{num_faults} differences")
    return int(num_faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run all sections and write what they give")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--only", nargs="+", choices=[one.__name__ for one in SECTIONS], metavar="SECTION")
    comparing = commands.add_parser("compare", help="list what differs between two records")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("other", type=Path)
    asked = parser.parse_args()
    sys.exit(write(asked.folder, asked.only) if asked.command == "write" else compare(asked.folder, asked.other))
