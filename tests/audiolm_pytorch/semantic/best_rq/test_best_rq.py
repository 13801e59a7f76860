import math
from pathlib import Path

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.audio.padding import length_mask
from audiolm_pytorch.semantic.best_rq import frontend, model as best_rq
from audiolm_pytorch.semantic.best_rq.frontend import StackedLogMel
from audiolm_pytorch.semantic.best_rq.model import BestRQ, BestRQEncoder
from audiolm_pytorch.semantic.best_rq.targets import (
    Decorrelation,
    RandomProjectionQuantizer,
    TokenTargets,
    sample_span_mask,
)

RATE_HZ = 4000
TOKEN_SAMPLES = 160


def tiny_encoder(**changes) -> BestRQEncoder:
    torch.manual_seed(0)
    numbers = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "sample_hz": RATE_HZ, "num_mels": 20, "n_fft": 256}
    return BestRQEncoder(**{**numbers, "hop_length": 40, **changes}).eval()


def melody(num_tokens: int, seed: int) -> torch.Tensor:
    """A wave `[n]` of pure tones, four tokens each."""
    generator = torch.Generator().manual_seed(seed)
    pitches_hz = 200.0 * 2 ** (torch.randint(0, 24, (-(-num_tokens // 4),), generator=generator) / 12)
    frequency_hz = pitches_hz.repeat_interleave(4 * TOKEN_SAMPLES)[: num_tokens * TOKEN_SAMPLES]
    return 0.3 * torch.sin(2 * math.pi * torch.cumsum(frequency_hz, 0) / RATE_HZ)


def test_num_frames_is_what_forward_gives():
    """Guards the count: ceil(n / downsample_factor), equal to the length of the features, for 200 random lengths."""
    front_end = tiny_encoder().front_end
    lengths = torch.randint(
        TOKEN_SAMPLES, 40 * TOKEN_SAMPLES, (200,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    for num_samples in (*lengths, TOKEN_SAMPLES, TOKEN_SAMPLES + 1, 2 * TOKEN_SAMPLES):
        frames, mask = front_end(torch.zeros(1, num_samples))
        assert front_end.num_frames(num_samples) == frames.shape[1] == int(mask.sum())
        assert front_end.num_frames(num_samples) == math.ceil(num_samples / TOKEN_SAMPLES)


def test_default_rate_is_25_tokens_a_second():
    """Guards the rate that the language models count on: 640 samples a token at 16 kHz, 25 in a second."""
    encoder = BestRQEncoder(dim=8, depth=1, heads=1, dim_head=8)
    assert (encoder.sample_hz, encoder.downsample_factor, encoder.num_frames(16_000)) == (16_000, 640, 25)


def test_token_sees_its_own_samples():
    """Guards time: a click in token i changes token i most, and nothing further away than one analysis window."""
    front_end = tiny_encoder().front_end
    quiet = torch.zeros(1, 20 * TOKEN_SAMPLES)
    click = quiet.clone()
    click[0, 7 * TOKEN_SAMPLES + TOKEN_SAMPLES // 2] = 1.0
    change = (front_end(click)[0] - front_end(quiet)[0]).square().sum(dim=-1)[0]
    assert int(change.argmax()) == 7
    assert set(change.nonzero().flatten().tolist()) <= {6, 7, 8}


def test_statistics_normalise_the_corpus():
    """Guards `fit`: every band has zero mean and unit variance over the corpus, and the same again in another order."""
    front_end = tiny_encoder().front_end
    waves = [
        melody(30 + 7 * seed, seed) + 0.01 * torch.randn(1, generator=torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    front_end.fit(waves)
    frames = torch.cat([front_end(wave[None])[0].reshape(-1, 20) for wave in waves])
    loud = front_end.std > 0.011  # silent bands keep the least spread
    torch.testing.assert_close(frames.mean(dim=0), torch.zeros(20), atol=1e-3, rtol=0)
    torch.testing.assert_close(frames.std(dim=0)[loud], torch.ones(int(loud.sum())), atol=1e-2, rtol=0)
    mean = front_end.mean.clone()
    front_end.fit(reversed(waves))
    torch.testing.assert_close(front_end.mean, mean)
    with pytest.raises(ValueError, match="at least one wave"):
        front_end.fit([])


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_features_alone_equal_those_in_a_batch(layer):
    """Guards padding: neither mel windows nor statistics nor attention may see past an item's end."""
    encoder = tiny_encoder()
    lengths = torch.tensor([3120, 1700, 160, 4000])
    waves = torch.randn(4, 4000, generator=torch.Generator().manual_seed(1))
    waves[~length_mask(lengths, 4000)] = torch.nan  # whatever is read there would spread
    together, mask = encoder.features(waves, lengths, layer)
    for row, length in enumerate(lengths.tolist()):
        alone, own_mask = encoder.features(waves[row : row + 1, :length], None, layer)
        assert own_mask.all() and int(mask[row].sum()) == alone.shape[1] == encoder.num_frames(length)
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("context", [0, 3])
def test_long_waves_are_encoded_in_windows(context, monkeypatch):
    """Guards windows: alone equals in batch at every length around their edges, in whatever portions they are computed,
    and distant sound changes nothing."""
    encoder = tiny_encoder(window_tokens=10, context_tokens=context)
    lengths = torch.tensor([count * TOKEN_SAMPLES for count in (1, 9, 10, 11, 13, 20, 35)])
    waves = torch.randn(7, 35 * TOKEN_SAMPLES, generator=torch.Generator().manual_seed(1))
    together, mask = encoder.features(waves, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder.features(waves[row : row + 1, :length])
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)
    assert mask.sum(dim=1).tolist() == [1, 9, 10, 11, 13, 20, 35]
    louder = waves[-1:].clone()
    louder[:, 25 * TOKEN_SAMPLES :] *= 3
    monkeypatch.setattr(best_rq, "_WINDOWS_PER_BATCH", 2)
    monkeypatch.setattr(frontend, "_FRAMES_PER_CHUNK", 33)
    torch.testing.assert_close(encoder.features(waves, lengths)[0], together, atol=1e-5, rtol=1e-5)
    change = (encoder.features(louder)[0] - together[-1:]).abs().amax(dim=-1)[0] > 1e-4
    assert not change[: 20 if context == 0 else 10].any() and change[25:].all()


def test_truncated_keeps_the_hidden_states():
    """Guards `truncated`: fewer blocks, the same hidden states, and no shared memory with the encoder it came from."""
    encoder = tiny_encoder(depth=3)
    short = encoder.truncated(2)
    wave = melody(12, 0)[None]
    torch.testing.assert_close(short.features(wave, None, 2)[0], encoder.features(wave, None, 2)[0], atol=0, rtol=0)
    assert (short.depth, len(short.transformer.blocks), short.config["depth"]) == (2, 2, 2)
    with torch.no_grad():
        encoder.to_tokens.weight.zero_()
    assert short.to_tokens.weight.abs().sum() > 0
    torch.testing.assert_close(short.truncated(0).features(wave, None, 0)[0], short.features(wave, None, 0)[0])
    with pytest.raises(ValueError, match=r"0\.\.3"):
        encoder.truncated(4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_give_nearly_the_same_features(dtype):
    """Guards `.half()`: the front end hands on float32, the blocks take what their weights are."""
    encoder = tiny_encoder()
    waves = torch.stack([melody(30, 0), melody(30, 1)])
    expected, mask = encoder.features(waves)
    features, same_mask = encoder.to(dtype).features(waves)
    assert features.dtype == dtype and torch.equal(mask, same_mask)
    assert torch.nn.functional.cosine_similarity(features.float(), expected, dim=-1).min() > 0.98


def test_targets_are_frozen_and_depend_on_the_seed_alone():
    """Guards the targets: no parameters, the same for a seed whatever the global generator does, others for another."""
    frames = torch.randn(50, 80, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = RandomProjectionQuantizer(80, 64, num_targets=3, seed=5)
    torch.manual_seed(2)
    second, other = (RandomProjectionQuantizer(80, 64, num_targets=3, seed=seed) for seed in (5, 6))
    assert not list(first.parameters())
    assert torch.equal(first(frames), second(frames)) and not torch.equal(first(frames), other(frames))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(frames), second(frames.bfloat16().float() * 0 + frames))


def test_targets_are_the_nearest_codes():
    """Guards the search against the definition: least distance of unit-norm projection and codes (eq. 1)."""
    quantizer = RandomProjectionQuantizer(24, 40, codebook_dim=4, num_targets=2, seed=1)
    frames = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    for target in range(2):
        projected = torch.nn.functional.normalize(frames @ quantizer.projection[target], dim=-1)
        distance = (projected[:, None] - quantizer.codebook[target][None]).norm(dim=-1)
        assert torch.equal(quantizer(frames)[:, target], distance.argmin(dim=-1))


def test_span_mask_hides_spans_of_real_tokens():
    """Guards the mask: only real tokens, at least one each, runs of the asked length, about the expected share."""
    lengths = torch.tensor([400, 1, 3, 400])
    valid = length_mask(lengths, 400)
    hidden = sample_span_mask(valid, 0.05, 6, torch.Generator().manual_seed(0))
    assert not (hidden & ~valid).any() and hidden.any(dim=1).all()
    edges = torch.nn.functional.pad(hidden[[0, 3]].int(), (1, 1)).diff(dim=1)
    runs = edges.eq(-1).nonzero()[:, 1] - edges.eq(1).nonzero()[:, 1]
    inside = edges.eq(-1).nonzero()[:, 1] < 400
    assert (runs[inside] >= 6).all()
    assert abs(float(hidden[[0, 3]].float().mean()) - (1 - 0.95**6)) < 0.08
    assert torch.equal(hidden, sample_span_mask(valid, 0.05, 6, torch.Generator().manual_seed(0)))
    assert sample_span_mask(valid, 0.0, 1).sum(dim=1).tolist() == [1, 1, 1, 1]


def test_decorrelation_whitens_the_strongest_directions():
    """Guards the directions: zero mean, unit variance, no correlation, strongest first, whatever the batches are."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4000, 3, generator=generator) * torch.tensor([5.0, 2.0, 0.5])
    mixing, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    vectors = vectors @ mixing[:3] + 1.0
    decorrelation = Decorrelation(6, 2)
    decorrelation.fit(vectors.split(700))
    found = decorrelation(vectors)
    torch.testing.assert_close(found.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.T.cov(), torch.eye(2), atol=2e-3, rtol=0)
    directions = torch.nn.functional.normalize(decorrelation.basis, dim=0)
    assert ((directions * mixing[:2].T).sum(dim=0).abs() > 0.99).all()
    with pytest.raises(ValueError, match="at least one vector"):
        decorrelation.fit([])
    with pytest.raises(ValueError, match=r"1\.\.6"):
        Decorrelation(6, 7)


def test_targets_describe_the_neighbourhood():
    """Guards the reach: a target changes with a token within it, with none beyond, and padding counts as silence."""
    frames = torch.randn(1, 12, 10, generator=torch.Generator().manual_seed(0))
    targets = TokenTargets(10, 64, num_targets=8, reach_tokens=2, num_directions=20)
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    targets.fit([(frames, everywhere)])
    changed = frames.clone()
    changed[0, 5] += 3.0
    differs = (targets(frames, everywhere) != targets(changed, everywhere)).any(dim=1)
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    padded = torch.nn.functional.pad(frames, (0, 0, 0, 4))
    real = torch.nn.functional.pad(everywhere, (0, 4))
    assert torch.equal(targets(padded, real), targets(frames, everywhere))
    vectors = targets.neighbourhoods(frames, everywhere)
    assert torch.equal(vectors[5], frames[0, 3:8].flatten())


@pytest.mark.parametrize("seen_weight", [0.0, 0.5])
def test_hidden_tokens_are_not_seen_and_others_weigh_as_asked(seen_weight):
    """Guards the objective: noise stands in for hidden tokens; loss = hidden + weight * seen; padding never counts."""
    model = BestRQ(tiny_encoder(), codebook_size=16, num_targets=3, num_directions=8, seen_weight=seen_weight)
    shown = []
    model.encoder.to_tokens.register_forward_hook(lambda module, inputs, output: shown.append(inputs[0]))
    waves = torch.stack([melody(20, 0), melody(20, 1)])
    lengths = torch.tensor([20 * TOKEN_SAMPLES, 9 * TOKEN_SAMPLES])
    out = model(waves, lengths, torch.Generator().manual_seed(0))
    frames, valid = model.encoder.front_end(waves, lengths)
    assert not (out.hidden & ~valid).any()
    assert torch.equal(shown[0][~out.hidden], frames[~out.hidden])
    assert shown[0][out.hidden].std() < 0.2 < frames[out.hidden].std()

    log_probs = model.to_logits(model.encoder.encode(shown[0], valid)).unflatten(-1, (3, 16)).log_softmax(dim=-1)
    targets = model.targets(frames, torch.ones_like(valid)).unflatten(0, valid.shape)
    costs = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1).mean(dim=-1)
    seen = valid & ~out.hidden
    torch.testing.assert_close(out.loss, costs[out.hidden].mean() + seen_weight * costs[seen].mean())
    hits = (log_probs.argmax(dim=-1) == targets).float().mean(dim=-1)
    torch.testing.assert_close(out.accuracy, hits[out.hidden].mean())


@pytest.mark.slow
def test_learns_far_below_chance():
    """Guards learning: on two melodies the loss falls far below chance, and accuracy beats the majority class."""
    torch.manual_seed(0)
    waves = torch.stack([melody(24, seed) for seed in range(2)]).repeat(4, 1)
    as_published = {"num_targets": 4, "reach_tokens": 0, "num_directions": None, "seen_weight": 0}
    model = BestRQ(tiny_encoder(), codebook_size=32, start_prob=0.05, **as_published)
    model.encoder.front_end.fit(waves)
    model.targets.fit([model.encoder.front_end(waves)])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    outputs = []
    for step in range(90):
        out = model(waves, None, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        outputs.append([out.loss.item(), out.accuracy.item(), out.majority.item()])
    first, last = torch.tensor(outputs[:5]).mean(dim=0), torch.tensor(outputs[-20:]).mean(dim=0)
    assert abs(first[0] - math.log(32)) < 1.0
    assert last[0] < 0.5 * math.log(32)
    assert last[1] > 1.5 * last[2] > 1.5 / 32


@pytest.mark.parametrize(
    ("wave", "lengths", "message"),
    [
        (torch.zeros(1, TOKEN_SAMPLES - 1), None, f"at least {TOKEN_SAMPLES} samples"),
        (torch.zeros(2, 800), torch.tensor([800, 159]), f"at least {TOKEN_SAMPLES} samples"),
        (torch.zeros(2, 800), torch.tensor([800, 801]), "801"),
        (torch.zeros(2, 800), torch.tensor([800]), "2 integers"),
        (torch.zeros(2, 800), torch.tensor([800.0, 800.0]), "integers"),
        (torch.zeros(2, 2, 800), None, r"\[b, n\]"),
        (torch.zeros(2, 800, dtype=torch.int64), None, "float"),
    ],
)
def test_bad_waves_are_refused(wave, lengths, message):
    """Error messages have the input, and the minimum number of samples if a wave is too short."""
    with pytest.raises(ValueError, match=message):
        tiny_encoder().features(wave, lengths)


def test_bad_numbers_are_refused():
    """Guards the constructors: windows shorter than their hop, empty codebooks, probabilities out of range."""
    with pytest.raises(ValueError, match="raise n_fft"):
        StackedLogMel(n_fft=100, hop_length=160)
    with pytest.raises(ValueError, match="codebook_size"):
        RandomProjectionQuantizer(8, 1)
    with pytest.raises(ValueError, match="window_tokens"):
        tiny_encoder(window_tokens=0)
    with pytest.raises(ValueError, match="start_prob"):
        BestRQ(tiny_encoder(), start_prob=1.5)


@pytest.mark.slow
def test_trainer_trains_resumes_and_fits_a_tokenizer(tmp_path: Path):
    """Guards the way from a folder to a saved tokenizer: statistics set, chance reported, resumed, ids usable."""
    from audiolm_pytorch.saving.modules import load_module
    from audiolm_pytorch.semantic import KMeansTokenizer, SemanticTokenizerTrainer

    for seed in range(4):
        write_audio(tmp_path / "audio" / f"{seed}.wav", melody(40, seed), RATE_HZ)

    def trainer() -> SemanticTokenizerTrainer:
        encoder = tiny_encoder()
        return SemanticTokenizerTrainer(
            encoder=encoder,
            folder=tmp_path / "audio",
            batch_size=2,
            seconds=0.8,
            num_train_steps=4,
            results_folder=tmp_path / "run",
            objective=BestRQ(encoder, codebook_size=32, num_directions=16),
            warmup_steps=1,
        )

    first = trainer()
    with pytest.raises(RuntimeError, match="train"):
        first.fit_tokenizer(layer=1, num_clusters=4)
    first.train(stop_after_steps=2)
    second = trainer()
    result = second.train()
    assert result.step == 4 and second.loop.is_finished
    assert second.task.chance == {"loss": 2 * math.log(32), "accuracy": 1 / 32}
    assert second.task.module.targets.decorrelation.mean.abs().sum() > 0
    metrics = second.task.validate()
    assert set(metrics) == {"loss", "accuracy", "majority"} and metrics == second.task.validate()
    fit = second.fit_tokenizer(num_clusters=4)
    assert fit.tokenizer.layer == fit.tokenizer.encoder.depth == 2
    assert fit.tokenizer.encoder.front_end.mean.abs().sum() > 0
    loaded = load_module(tmp_path / "run" / "tokenizer", KMeansTokenizer)
    assert torch.equal(loaded(melody(20, 9)[None]), fit.tokenizer(melody(20, 9)[None]))


def test_trainer_refuses_what_does_not_fit(tmp_path: Path):
    """Guards the trainer's arguments: one source of audio, and an objective around the encoder that is trained."""
    from audiolm_pytorch.data import AudioItem
    from audiolm_pytorch.semantic import SemanticTokenizerTrainer

    numbers = {"batch_size": 1, "num_train_steps": 1, "results_folder": tmp_path}
    with pytest.raises(ValueError, match="folder"):
        SemanticTokenizerTrainer(encoder=tiny_encoder(), **numbers)
    short = [AudioItem(tmp_path / "short.wav", None, {}, RATE_HZ, TOKEN_SAMPLES - 1)]
    with pytest.raises(ValueError, match="short.wav .too short"):
        SemanticTokenizerTrainer(encoder=tiny_encoder(), items=(short, short), **numbers)
    with pytest.raises(ValueError, match="empty list of training items"):
        SemanticTokenizerTrainer(encoder=tiny_encoder(), items=([], short), **numbers)
    with pytest.raises(ValueError, match="objective"):
        SemanticTokenizerTrainer(encoder=tiny_encoder(), folder=tmp_path, objective=BestRQ(tiny_encoder()), **numbers)
