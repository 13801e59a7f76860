"""Can SoundStream learn one clip by heart? Default arguments, 24 kHz, five seconds of a real recording.

`python tests/benchmarks/codec_overfit.py ../shared/data/recordings/solo_trumpet.ogg --out run`: half an hour on one
core. Prints the mel distance (nepers) after 100 steps, which are without codes, and at the end, through the codes. Then
SI-SDR, and how alike MuLaN finds the clip and its reconstruction, beside the same for other recordings.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from audiolm_pytorch import MusicLMSoundStream, SoundStream, SoundStreamTrainer
from audiolm_pytorch.audio.files import read_audio, write_audio
from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.codecs.distances import si_sdr_db
from audiolm_pytorch.codecs.training import MultiScaleMelLoss
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch import MusicLM

SAMPLE_HZ, SECONDS = 24_000, 5.0


def first_seconds(path: Path) -> Tensor:
    """The clip `[n]`."""
    return read_audio(path, SAMPLE_HZ, duration_seconds=SECONDS)[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    arguments = parser.parse_args()
    write_audio(arguments.out / "clip" / "clip.wav", first_seconds(arguments.clip), SAMPLE_HZ)
    items = load_items(arguments.out / "clip").items
    torch.manual_seed(0)
    trainer = SoundStreamTrainer(
        MusicLMSoundStream(),
        items=(items, items),
        batch_size=1,
        num_train_steps=arguments.steps,
        results_folder=arguments.out / "run",
        validate_every=100,
    )
    trainer.train()

    rows = [json.loads(line) for line in (arguments.out / "run" / "metrics.jsonl").read_text().splitlines()]
    distances = {row["step"]: row["mel_distance"] for row in rows if row["phase"] == "valid"}
    codec = SoundStream.init_and_load_from(arguments.out / "run" / "codec")
    wave = first_seconds(arguments.out / "clip" / "clip.wav")[None, None]
    again = codec.decode_from_codebook_indices(codec.tokenize(wave), num_samples=wave.shape[-1])
    write_audio(arguments.out / "again.wav", again[0], SAMPLE_HZ)
    mel = MultiScaleMelLoss(SAMPLE_HZ)(again, wave).item()
    gain = distances[100] / mel
    print(f"mel distance after 100 steps {distances[100]:.3f}, at the end {mel:.3f}: {gain:.2f} times less")
    print(f"SI-SDR {si_sdr_db(again, wave).mean().item():.1f} dB")

    mulan = MusicLM.from_pretrained("tiny").mulan_embed_quantizer.mulan

    def latent(sound: Tensor) -> Tensor:
        return mulan.get_audio_latents(resample(sound, SAMPLE_HZ, 16_000))

    with torch.no_grad():
        clip = latent(wave[0])
        print(f"MuLaN similarity to the clip {(latent(again[0]) @ clip.T).item():.3f}")
        for path in sorted(arguments.clip.parent.glob("*.ogg")):
            if path.name != arguments.clip.name:
                print(f"  of {path.stem} {(latent(first_seconds(path)[None]) @ clip.T).item():.3f}")


if __name__ == "__main__":
    main()
