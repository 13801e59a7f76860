"""An AudioLM with fake tokenizers and untrained stages of distinct logits."""

import torch

from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs import SoundStream, SpectralSoundStream
from audiolm_pytorch.generation.wrappers import (
    CoarseTransformerWrapper,
    FineTransformerWrapper,
    SemanticTransformerWrapper,
)
from tests.helpers import fakes


def audiolm_of(conditioned=False, hears_text=False, lost_frames=0, codec=None, ends=False, **changes):
    """An AudioLM. With `ends`, about every twentieth semantic token ends the item."""
    changes = {**(fakes.CONDITION if conditioned else {}), **({"text_dim": 6} if hears_text else {}), **changes}
    stages = fakes.tiny_stages(**changes)
    for stage in stages.values():
        for weight in stage.heads.parameters():
            weight.data.mul_(40)
    if ends:
        stages["semantic"].heads[0].weight.data.zero_()
    return AudioLM(
        wav2vec=fakes.FakeSemanticTokenizer(lost_frames),
        codec=fakes.FakeCodec() if codec is None else codec,
        **{f"{name}_transformer": stage for name, stage in stages.items()},
        audio_conditioner=fakes.FakeConditioner() if conditioned else None,
        text_conditioner=fakes.FakeTextConditioner() if hears_text else None,
    )


def wrapped_stages(audio_lm):
    """The stages of an AudioLM by name, each in its wrapper."""
    parts = {name: getattr(audio_lm, name) for name in ("wav2vec", "codec", "audio_conditioner", "text_conditioner")}
    wrappers = {
        "semantic": SemanticTransformerWrapper,
        "coarse": CoarseTransformerWrapper,
        "fine": FineTransformerWrapper,
    }
    return {name: wrappers[name](stage, **parts) for name, stage in audio_lm.stages.items()}


def streaming_codec(kind="causal", audio_channels=1):
    """A tiny codec with the sizes of `FakeCodec`. The spectral codec has a look-ahead, the causal one has none."""
    torch.manual_seed(5)
    sizes = {
        "target_sample_hz": fakes.SAMPLE_HZ,
        "codebook_size": 16,
        "rq_num_quantizers": 4,
        "audio_channels": audio_channels,
    }
    if kind == "spectral":
        codec = SpectralSoundStream(dim=16, encoder_depth=1, decoder_depth=2, hop_samples=16, code_dim=4, **sizes)
    else:
        codec = SoundStream(codebook_dim=16, channels=4, strides=(4, 4), **sizes)
    for parameter in codec.decoder.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # so that every part changes the wave
    return codec.eval()
