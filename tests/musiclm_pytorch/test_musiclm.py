import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from audiolm_pytorch.audio.resample import resample
from audiolm_pytorch.audiolm import AudioLM
from audiolm_pytorch.codecs.base import Codec
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.lm.stages import CoarseTransformer, FineTransformer, SemanticTransformer
from audiolm_pytorch.semantic.base import SemanticTokenizer
from musiclm_pytorch.mulan import MuLaN
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.quantizer.embed_quantizer import MuLaNEmbedQuantizer
from tests.helpers.tiny_mulan import tiny_mulan, tones
from tests.helpers.toy_audiolm import audiolm_of

PITCHES_HZ = (110, 330, 990, 2970)
TEXTS = ["low tone", "middle tone", "high tone", "very high tone"]
STAGES = ("semantic", "coarse", "fine")


def _transformers(widths: tuple[int | None, ...]) -> nn.ModuleDict:
    """Stages of random weights, each with a condition of the given width, or None."""
    torch.manual_seed(0)
    conditions = [{"audio_text_condition": width is not None, "cond_dim": width} for width in widths]
    stack = {"dim": 16, "depth": 1, "heads": 2, "dim_head": 8}
    levels = {"codebook_size": 5, "num_coarse_quantizers": 2, **stack}
    stages = (
        SemanticTransformer(num_semantic_tokens=7, **conditions[0], **stack),
        CoarseTransformer(num_semantic_tokens=7, **conditions[1], **levels),
        FineTransformer(num_fine_quantizers=1, **conditions[2], **levels),
    )
    return nn.ModuleDict(dict(zip(STAGES, stages)))


class FakeAudioLM(AudioLM):
    """Returns a loud tone of one of four pitches per seed, with a trace of the condition; records its calls."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.codec, self.audio_conditioner = SimpleNamespace(target_sample_hz=12000), None
        self.dropout = nn.Dropout(0.5)
        self.calls: list[dict[str, Any]] = []
        self.transformers = _transformers((6, 6, 6))

    @property
    def stages(self) -> dict[str, Any]:
        return dict(self.transformers.items())

    def generate(self, request: GenerationRequest) -> Any:
        self.calls.append({"size": request.batch_size, **vars(request)})
        codes = [request.conditioning[stage]["codes"] for stage in STAGES]
        assert request.batch_size == len(request.seeds) and all(len(one) in (1, request.batch_size) for one in codes)
        waves = 4 * tones(*(PITCHES_HZ[seed % 4] for seed in request.seeds), seconds=request.seconds, sample_hz=12000)
        trace = torch.stack([one.embeddings.flatten(1).mean(dim=1) for one in codes]).sum(dim=0)
        return SimpleNamespace(waves=self.dropout(waves + 0.01 * trace.unsqueeze(1)))


@pytest.fixture(scope="module")
def trained() -> MuLaN:
    """A MuLaN trained on one text per pitch."""
    mulan = tiny_mulan()
    optimizer = torch.optim.Adam(mulan.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        mulan(tones(*PITCHES_HZ), TEXTS).backward()
        optimizer.step()
    return mulan.requires_grad_(False)


@pytest.fixture
def musiclm(trained: MuLaN) -> MusicLM:
    """MusicLM over the fake, with conditions of one width."""
    quantizer = MuLaNEmbedQuantizer(
        mulan=trained, conditioning_dims=(6, 6, 6), namespaces=STAGES, rq_num_quantizers=2, codebook_size=8
    )
    quantizer.fit(torch.randn(64, 16), seed=0)
    return MusicLM(audio_lm=FakeAudioLM(), mulan_embed_quantizer=quantizer)


def _pitches(waves: Tensor) -> list[int]:
    """The strongest of the four frequencies of each wave in Hz."""
    peaks = torch.fft.rfft(waves - waves.mean(dim=-1, keepdim=True)).abs().argmax(dim=-1)
    return [min(PITCHES_HZ, key=lambda hz: abs(hz - float(peak) * 12000 / waves.shape[-1])) for peak in peaks]


def test_the_best_candidate_of_a_text_is_returned(musiclm: MusicLM) -> None:
    """The best of four by MuLaN, as (1, samples), of the requested length and below full scale."""
    for index, text in enumerate(TEXTS):
        music = musiclm(text, num_samples=4, seconds=0.4, seed=0)
        assert music.shape == (1, 4800) and music.abs().max() <= 1
        assert _pitches(music) == [PITCHES_HZ[index]]


def test_scores_equal_a_naive_loop(musiclm: MusicLM, trained: MuLaN) -> None:
    """Each candidate is resampled to the rate of MuLaN and scored alone; the order follows the scores."""
    result = musiclm(TEXTS[:2], num_samples=3, seconds=0.4, seed=5, return_all=True)
    assert result.waves.shape == (2, 3, 4800) and result.seeds == ((5, 6, 7), (5, 6, 7)) and result.sample_hz == 12000
    for prompt in range(2):
        for candidate in range(3):
            wave = resample(result.waves[prompt, candidate], 12000, 8000)
            score = trained.get_audio_latents(wave[None]) @ trained.get_text_latents(TEXTS[prompt]).T
            torch.testing.assert_close(result.scores[prompt, candidate], score.squeeze(), atol=1e-5, rtol=0)
        ranked = result.scores[prompt][result.order[prompt]]
        assert torch.equal(ranked, ranked.sort(descending=True).values)
    assert torch.equal(result.best[0], result.waves[0, result.order[0, 0]])


def _every_stage_gets_its_own_condition(musiclm: MusicLM) -> bool:
    """Whether each stage receives the embeddings of its own table."""
    fake, quantizer = musiclm.audio_lm, musiclm.mulan_embed_quantizer
    musiclm("low tone", num_samples=1, seconds=0.4, seed=0)
    codes = quantizer.codes(texts="low tone") + quantizer.codebook_size * torch.arange(2)
    inputs = fake.calls[-1]["conditioning"]
    return all(torch.equal(inputs[stage]["codes"].embeddings, quantizer.table(stage)(codes)) for stage in STAGES)


def test_every_stage_has_its_own_namespace(musiclm: MusicLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 1: all stages were conditioned by the semantic table. The check fails for this fault."""
    assert _every_stage_gets_its_own_condition(musiclm)
    own = MuLaNEmbedQuantizer.conditioning
    monkeypatch.setattr(
        MuLaNEmbedQuantizer, "conditioning", lambda self, **inputs: own(self, **{**inputs, "namespace": "semantic"})
    )
    assert not _every_stage_gets_its_own_condition(musiclm)


def _is_one_batch(musiclm: MusicLM) -> bool:
    """Whether one call generates all candidates of all prompts."""
    musiclm.audio_lm.calls.clear()
    musiclm(TEXTS[:3], num_samples=2, seconds=0.4, seed=0)
    return [call["size"] for call in musiclm.audio_lm.calls] == [6]


def test_all_candidates_are_one_batch(musiclm: MusicLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 6: candidates were sampled one after another. The check fails for this fault."""
    assert _is_one_batch(musiclm)
    own = MusicLM._generate

    def one_by_one(self: MusicLM, conditions: Any, seeds: list[int], max_batch: int, **others: Any) -> Tensor:
        return own(self, conditions, seeds, 1, **others)

    monkeypatch.setattr(MusicLM, "_generate", one_by_one)
    assert not _is_one_batch(musiclm)


def _every_prompt_gets_its_own(musiclm: MusicLM) -> bool:
    """Whether each of several prompts in one call gets the pitch that it names."""
    music = musiclm([TEXTS[2], TEXTS[0], TEXTS[3]], num_samples=4, seconds=0.4, seed=0)
    return _pitches(music) == [PITCHES_HZ[2], PITCHES_HZ[0], PITCHES_HZ[3]]


def test_candidates_are_scored_by_their_own_prompt(musiclm: MusicLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of another prompt's text fail the check."""
    assert _every_prompt_gets_its_own(musiclm)

    def crossed(self: MusicLM, prompts: list[str], waves: Tensor, *, max_batch: int) -> Tensor:
        mulan = self.mulan_embed_quantizer.mulan
        rows = resample(rearrange(waves, "p k n -> (p k) n"), 12000, 8000)
        own = repeat(mulan.get_text_latents(prompts), "p d -> (k p) d", k=waves.shape[1])
        return rearrange((mulan.get_audio_latents(rows) * own).sum(dim=1), "(p k) -> p k", p=len(prompts))

    monkeypatch.setattr(MusicLM, "scores", crossed)
    assert not _every_prompt_gets_its_own(musiclm)


def test_a_candidate_depends_on_its_prompt_and_seed_alone(musiclm: MusicLM) -> None:
    """A candidate is the same alone, among others, in all batch sizes, and when generated again by its seed."""
    whole = musiclm(TEXTS, num_samples=4, seconds=0.4, seed=7, return_all=True)
    parts = musiclm(TEXTS, num_samples=4, seconds=0.4, seed=7, return_all=True, max_batch=3)
    assert [call["size"] for call in musiclm.audio_lm.calls] == [16] + [3] * 5 + [1]
    torch.testing.assert_close(whole.waves, parts.waves)
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-5, rtol=0)
    winner = whole.seeds[2][int(whole.order[2, 0])]
    again = musiclm(TEXTS[2], num_samples=1, seconds=0.4, seeds=[winner])
    torch.testing.assert_close(again[0], whole.best[2])


def test_without_a_seed_torch_draws_one(musiclm: MusicLM) -> None:
    """Every call has new seeds, and torch.manual_seed repeats them."""
    torch.manual_seed(3)
    first = musiclm("low tone", seconds=0.4, return_all=True).seeds
    second = musiclm("low tone", seconds=0.4, return_all=True).seeds
    torch.manual_seed(3)
    assert musiclm("low tone", seconds=0.4, return_all=True).seeds == first != second


def test_generation_is_in_eval_mode(musiclm: MusicLM) -> None:
    """The dropout of the fake would set half the samples to zero; the mode is restored afterwards."""
    musiclm.train()
    music = musiclm("low tone", num_samples=1, seconds=0.4, seed=0)
    assert (music == 0).float().mean() < 0.1
    assert musiclm.audio_lm.training and not musiclm.mulan_embed_quantizer.mulan.training


def test_a_candidate_with_nan_is_ranked_last(musiclm: MusicLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other candidates still have scores."""
    own = FakeAudioLM.generate

    def broken(self: FakeAudioLM, request: GenerationRequest) -> Any:
        audio = own(self, request)
        audio.waves[0, 5] = torch.nan
        return audio

    monkeypatch.setattr(FakeAudioLM, "generate", broken)
    result = musiclm("low tone", num_samples=4, seconds=0.4, seed=0, return_all=True)
    assert result.order[0, -1] == 0 and result.best.isfinite().all() and result.scores[0, 1:].isfinite().all()


def test_settings_reach_the_audio_lm(musiclm: MusicLM) -> None:
    """Further keywords are passed to AudioLM."""
    musiclm("low tone", num_samples=1, seconds=0.4, sampling={"fine": {"temperature": 0.1}})
    assert musiclm.audio_lm.calls[-1]["sampling"] == {"fine": {"temperature": 0.1}}


def test_further_conditions_belong_to_their_texts(musiclm: MusicLM) -> None:
    """Every candidate receives the tempo of its text, and the codes of the text."""
    musiclm(TEXTS[:2], num_samples=2, seconds=0.4, seed=0, conditions={"tempo": torch.tensor([[90.0], [120.0]])})
    call = musiclm.audio_lm.calls[-1]
    assert call["conditions"]["tempo"].tolist() == [[90.0], [90.0], [120.0], [120.0]]
    assert all(list(call["conditioning"][stage]) == ["codes"] for stage in STAGES)


def test_num_levels_masks_later_levels(musiclm: MusicLM) -> None:
    """The codes are masked, as in training."""
    for num_levels, expected in ((None, [True, True]), (1, [True, False])):
        musiclm("low tone", num_samples=1, seconds=0.4, num_levels=num_levels)
        inputs = musiclm.audio_lm.calls[-1]["conditioning"]
        assert all(inputs[stage]["codes"].mask.tolist() == [expected] for stage in STAGES)
    with pytest.raises(ValueError, match="num_levels"):
        musiclm("low tone", num_levels=3)


def test_invalid_arguments_raise_errors(musiclm: MusicLM, trained: MuLaN) -> None:
    """The message contains the argument."""
    with pytest.raises(ValueError, match="empty"):
        musiclm("  ")
    with pytest.raises(ValueError, match="empty"):
        musiclm([])
    with pytest.raises(ValueError, match="num_samples"):
        musiclm("low tone", num_samples=0)
    with pytest.raises(ValueError, match="seconds"):
        musiclm("low tone", seconds=0)
    with pytest.raises(ValueError, match="seeds"):
        musiclm("low tone", seeds=[1, 2])
    two = MuLaNEmbedQuantizer(mulan=trained, conditioning_dims=(6, 6), namespaces=("semantic", "coarse"))
    with pytest.raises(ValueError, match="fine"):
        MusicLM(audio_lm=FakeAudioLM(), mulan_embed_quantizer=two)


class ToyTokenizer(SemanticTokenizer):
    """25 semantic tokens per second at 8 kHz, all zero."""

    target_sample_hz, downsample_factor, codebook_size = 8000, 320, 7

    def fingerprint(self) -> str:
        return "toy"

    def num_frames(self, num_samples: int) -> int:
        return num_samples // 320

    def forward(self, wave: Tensor, input_sample_hz: int | None = None, lengths: Tensor | None = None) -> Tensor:
        return torch.zeros(len(wave), wave.shape[1] // 320, dtype=torch.long)


class ToyCodec(Codec):
    """A codec whose wave holds one value per frame, which depends on all codes."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = 12000, 240, 1, 3, 5

    def fingerprint(self) -> str:
        return "toy"

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        return torch.zeros(len(wave), self.num_frames(wave.shape[-1]), 3, dtype=torch.long)

    def decode_from_codebook_indices(self, codes: Tensor, num_samples: int | None = None) -> Tensor:
        held = (codes.float() @ torch.tensor([0.2, 0.04, 0.008])).repeat_interleave(240, dim=1)
        return held.unsqueeze(1)[..., :num_samples]


class LoudnessCodec(ToyCodec):
    """Codes are 1 for quiet and 2 for loud frames."""

    def tokenize(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        frames = nn.functional.pad(wave, (0, -wave.shape[-1] % 240)).unfold(-1, 240, 240).mean(dim=-1)
        return (1 + (frames > 0.2).long()).unsqueeze(-1).expand(-1, -1, 3)


def _real_musiclm(trained: MuLaN) -> MusicLM:
    """Stages of random weights with conditions of two widths; the fine stage has no condition."""
    stages = _transformers((6, 10, None))
    quantizer = MuLaNEmbedQuantizer(
        mulan=trained,
        conditioning_dims=(6, 10),
        namespaces=("semantic", "coarse"),
        rq_num_quantizers=2,
        codebook_size=8,
    )
    audio_lm = AudioLM(
        wav2vec=ToyTokenizer(),
        codec=ToyCodec(),
        **{f"{name}_transformer": stage for name, stage in stages.items()},
        audio_conditioner=quantizer,
    )
    return MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=quantizer)


@pytest.mark.slow
def test_real_stages_generate_the_same_alone_and_in_batches(trained: MuLaN) -> None:
    """Lengths, peaks, and a candidate that depends on its prompt and seed alone."""
    musiclm = _real_musiclm(trained)
    whole = musiclm(TEXTS[:2], num_samples=3, seconds=0.4, seed=11, return_all=True)
    assert whole.waves.shape == (2, 3, 4800) and whole.waves.abs().max() <= 1 and whole.scores.isfinite().all()
    assert all(len({tuple(wave.tolist()) for wave in candidates}) == 3 for candidates in whole.waves)
    alone = musiclm(TEXTS[1], num_samples=1, seconds=0.4, seeds=[12])
    assert torch.equal(alone[0], whole.waves[1, 1])


@pytest.mark.slow
def test_waves_to_continue_belong_to_their_texts(trained: MuLaN) -> None:
    """For all batch sizes, every candidate continues the wave of its own text."""
    musiclm = _real_musiclm(trained)
    musiclm.audio_lm.codec = LoudnessCodec()
    prompts = [torch.full((480,), 0.1), torch.full((720,), 0.3)]
    for max_batch in (1, 2, 3, 16):
        found = musiclm(
            TEXTS[:2], num_samples=2, seconds=0.4, seed=3, prime_wave=prompts, max_batch=max_batch, return_all=True
        )
        for prompt, frames in enumerate((2, 3)):
            beginning = found.waves[prompt, :, : 240 * frames]
            assert (beginning - 0.248 * (1 + prompt)).abs().max() < 0.01  # peaks can be scaled below full scale
        alone = musiclm(TEXTS[1], num_samples=1, seconds=0.4, seeds=[4], prime_wave=prompts[1])
        assert torch.equal(alone[0], found.waves[1, 1])
    one = musiclm(TEXTS[:2], num_samples=2, seconds=0.4, prime_wave=prompts[0], return_all=True)
    assert (one.waves[..., :480] - 0.248).abs().max() < 0.01
    with pytest.raises(ValueError, match="1 item per text .2.; got|different numbers of items"):
        musiclm(TEXTS[:2], num_samples=3, seconds=0.4, prime_wave=[*prompts, prompts[0]])
    with pytest.raises(TypeError, match="has no argument 'allow_eos'"):
        musiclm(TEXTS[0], allow_eos=True)


def test_incompatible_stages_raise_errors(trained: MuLaN) -> None:
    """The widths of the namespaces and the stages differ."""
    musiclm = _real_musiclm(trained)
    swapped = MuLaNEmbedQuantizer(mulan=trained, conditioning_dims=(10, 6), namespaces=("semantic", "coarse"))
    with pytest.raises(ValueError, match="widths"):
        MusicLM(audio_lm=musiclm.audio_lm, mulan_embed_quantizer=swapped)


def test_another_quantizer_than_in_training_raises_an_error(trained: MuLaN) -> None:
    """The message contains both fingerprints."""
    audio_lm = FakeAudioLM()
    sizes = {"conditioning_dims": (6, 6, 6), "namespaces": STAGES, "rq_num_quantizers": 2, "codebook_size": 8}
    ours, other = (MuLaNEmbedQuantizer(mulan=trained, **sizes) for _ in range(2))
    other.fit(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    audio_lm.transformers["coarse"].token_fingerprints = {"conditioner": ours.fingerprint()}
    MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=ours)
    message = f"coarse transformer was trained with {ours.fingerprint()}, .* is {other.fingerprint()}"
    with pytest.raises(ValueError, match=message):
        MusicLM(audio_lm=audio_lm, mulan_embed_quantizer=other)


def _check_registered_once(model: nn.Module) -> None:
    """No module and no tensor of a model has two names."""
    modules = list(model.named_modules(remove_duplicate=False))
    assert len({id(module) for _, module in modules}) == len(modules)
    tensors = [tensor for tensor in model.state_dict().values() if tensor.numel()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_state_dict_contains_every_tensor_once(trained: MuLaN) -> None:
    """The parts are registered under the names of the constructor arguments, also those that several parts use."""
    parts = ("wav2vec", "codec", "semantic_transformer", "coarse_transformer", "fine_transformer", "audio_conditioner")
    musiclm = MusicLM.from_pretrained("tiny")
    _check_registered_once(musiclm)
    names = {name.split(".")[1] for name in musiclm.state_dict() if name.startswith("audio_lm.")}
    assert names == set(parts) and list(dict(musiclm.named_children())) == ["audio_lm", "melody_embedder"]
    assert musiclm.mulan_embed_quantizer is musiclm.audio_lm.audio_conditioner
    copied = copy.deepcopy(musiclm)
    assert copied.mulan_embed_quantizer is copied.audio_lm.audio_conditioner is not musiclm.mulan_embed_quantizer

    text_and_codes = audiolm_of(conditioned=True, hears_text=True)
    _check_registered_once(text_and_codes)
    assert list(dict(text_and_codes.named_children())) == [*parts, "text_conditioner"]

    apart = _real_musiclm(trained)
    apart.audio_lm.audio_conditioner = None
    musiclm = MusicLM(audio_lm=apart.audio_lm, mulan_embed_quantizer=apart.mulan_embed_quantizer)
    _check_registered_once(musiclm)
    assert list(dict(musiclm.named_children())) == ["audio_lm", "mulan_embed_quantizer"]
