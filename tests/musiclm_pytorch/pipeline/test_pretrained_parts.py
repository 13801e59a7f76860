"""Runs with pretrained parts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from audiolm_pytorch.audio.files import read_audio
from audiolm_pytorch.codecs import Codec
from audiolm_pytorch.data.captions import decode_texts
from audiolm_pytorch.data.shards import TokenShards
from audiolm_pytorch.generation.request import GenerationRequest
from audiolm_pytorch.saving.files import read_json
from audiolm_pytorch.saving.fingerprint import fingerprint_of
from audiolm_pytorch.saving.model_folder import exact_dtype
from audiolm_pytorch.saving.modules import load_module
from audiolm_pytorch.semantic import SemanticTokenizer
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.pipeline.builders import build_codec, build_mulan, build_semantic_tokenizer
from musiclm_pytorch.pipeline.estimate import estimate, estimate_steps
from musiclm_pytorch.pipeline.pipeline import Pipeline
from musiclm_pytorch.pipeline.pretrained_parts import check_pretrained
from musiclm_pytorch.pipeline.steps import STEPS
from musiclm_pytorch.pretrained.export import export_musiclm
from tests.helpers.micro import MICRO, WORDS, write_clips

PRETRAINED = ("codec", "semantic-tokenizer", "mulan")
# Other numbers than the preset: 24 kHz, 40 frames a second, 5 levels of 20 codes; 50 tokens a second of 7.
OTHER = replace(
    MICRO,
    codec=replace(MICRO.codec, sample_hz=24000, hop_samples=600, codebook_size=20, num_quantizers=5),
    semantic_tokenizer=replace(MICRO.semantic_tokenizer, sample_hz=24000, token_hz=50, num_clusters=7),
)


def other_parts(seed: int = 0) -> dict[str, nn.Module]:
    """A codec, a semantic tokenizer and a MuLaN whose random weights fp16 would round."""
    torch.manual_seed(seed)
    captions = [f"a {word} tone" for word in WORDS]
    return {
        "codec": build_codec(OTHER).eval(),
        "semantic-tokenizer": build_semantic_tokenizer(OTHER).eval(),
        "mulan": build_mulan(OTHER, captions).eval(),
    }


@pytest.fixture(scope="module")
def parts():
    """The parts of `pretrained_run`."""
    return other_parts()


@pytest.fixture(scope="module")
def pretrained_run(parts, micro_data, tmp_path_factory):
    """A finished run with pretrained parts, and the reports of its steps."""
    out = tmp_path_factory.mktemp("passed") / "run"
    reports = list(Pipeline(MICRO, data=micro_data, out=out, pretrained=parts).run())
    return out, {report.step: report for report in reports}


@pytest.mark.slow
def test_pretrained_parts_are_saved_without_rounding_or_training(parts, pretrained_run):
    """The result of the step is the pretrained part, number for number, and there is no checkpoint."""
    out, reports = pretrained_run
    assert list(reports) == list(STEPS)
    for stage in PRETRAINED:
        assert reports[stage].summary == f"pretrained: {type(parts[stage]).__name__}"
        assert {path.name for path in (out / stage).iterdir()} == {"model", "report.json"}
        assert exact_dtype(parts[stage], torch.float16) is None
        assert fingerprint_of(load_module(out / stage / "model")) == fingerprint_of(parts[stage])
    for stage in ("semantic", "coarse", "fine"):
        assert (out / stage / "finished.json").is_file() and "accuracy" in reports[stage].summary
    known = read_json(out / "run.json")["pretrained"]
    assert known["codec"] == parts["codec"].fingerprint() and list(known) == list(PRETRAINED)


def test_tokens_are_those_of_the_pretrained_parts(parts, pretrained_run, micro_data):
    """The stages learn the tokens of the pretrained parts, at the rates of these parts."""
    shards = TokenShards(pretrained_run[0] / "tokens" / "train")
    codec, tokenizer, mulan = (parts[stage] for stage in PRETRAINED)
    assert shards.fingerprint["codec"] == codec.fingerprint()
    assert shards.fingerprint["semantic_tokenizer"] == tokenizer.fingerprint()
    items = Pipeline(MICRO, data=micro_data, out=pretrained_run[0], pretrained=parts).train_items
    record, wave = shards[2], read_audio(items[2].path, 24000)[0]
    assert torch.equal(torch.from_numpy(record["acoustic"]).long(), codec.tokenize(wave)[0])
    assert record["acoustic"].shape == (40, 5) and record["semantic"].shape == (50,)
    assert torch.equal(torch.from_numpy(record["semantic"]).long(), tokenizer(wave)[0])
    assert decode_texts(record["captions"]) == [items[2].caption]
    texts = mulan.get_text_latents(items[2].caption)
    torch.testing.assert_close(torch.from_numpy(record["text_latents"]).float(), texts, atol=1e-3, rtol=0.0)


@pytest.mark.slow
def test_fewer_levels_than_the_codec_has_are_modelled_decoded_and_exported(parts, pretrained_run, tmp_path):
    """With a preset of 3 levels and a codec of 5, the first 3 are generated, equally by the run and by its export."""
    out, _ = pretrained_run
    model = MusicLM.from_pretrained(out)
    made = model.audio_lm.generate(GenerationRequest(batch_size=2, seconds=0.5, seeds=3))
    assert made.acoustic.shape == (2, 20, 3) and made.sample_hz == 24000
    assert torch.equal(parts["codec"].decode_from_codebook_indices(made.acoustic)[:, 0], made.wave)
    request = {"num_samples": 2, "seconds": 0.5, "seed": 3, "return_all": True}
    ours = model("a low tone", **request)
    export_musiclm(out, tmp_path / "out")
    shipped = MusicLM.from_pretrained(tmp_path / "out")
    assert torch.equal(shipped("a low tone", **request).waves, ours.waves)
    assert fingerprint_of(shipped.mulan_embed_quantizer.mulan) == fingerprint_of(parts["mulan"])
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "fine" / "model.safetensors").values()} == {
        torch.float16
    }


def test_a_run_belongs_to_its_pretrained_parts(parts, pretrained_run, micro_data, micro_run, tmp_path):
    """The same parts continue a run; other parts, or none, raise an error."""
    out = shutil.copytree(pretrained_run[0], tmp_path / "run")
    shutil.rmtree(out / "mulan")
    # fresh modules of the same weights, as another session opens them
    again = Pipeline(MICRO, data=micro_data, out=out, pretrained=other_parts())
    assert [report.step for report in again.run() if report.summary != "done before"] == ["mulan"]
    others = {
        f"pretrained.codec: found {parts['codec'].fingerprint()}, expected .*": (
            out,
            {**parts, "codec": other_parts(1)["codec"]},
        ),
        "pretrained.mulan: found .*, expected none": (out, {stage: parts[stage] for stage in PRETRAINED[:2]}),
        "pretrained.codec: found .*, expected none": (out, {}),
        "pretrained.mulan: found none, expected .*": (micro_run, {"mulan": parts["mulan"]}),
    }
    for message, (folder, passed) in others.items():
        with pytest.raises(ValueError, match=f"contains a run with other settings.*{message}"):
            list(Pipeline(MICRO, data=micro_data, out=folder, pretrained=passed).run())
    assert set(read_json(micro_run / "run.json")["pretrained"].values()) == {"none"}


@pytest.mark.slow
def test_a_pretrained_mulan_needs_no_captions_and_is_saved_when_needed(parts, tmp_path):
    """Captions are not needed, and a step also saves the pretrained parts that it needs."""
    pipeline = Pipeline(
        MICRO, data=write_clips(tmp_path / "bare", 5, captions=False), out=tmp_path / "run", pretrained=parts
    )
    assert [report.step for report in pipeline.run("quantizer")] == ["mulan", "quantizer"]
    assert [report.step for report in pipeline.run("semantic")] == [
        "semantic-tokenizer",
        "codec",
        "tokens",
        "semantic",
    ]
    assert TokenShards(tmp_path / "run" / "tokens" / "train")[0]["text_latents"].shape == (0, 128)


@pytest.mark.slow
def test_dry_run_with_pretrained_parts(parts, micro_data, tmp_path):
    """Pretrained parts are not trained; their vocabularies and rates determine the other steps."""
    own = {one.step: one for one in estimate_steps(Pipeline(MICRO, data=micro_data, out=tmp_path / "run"))}
    pipeline = Pipeline(MICRO, data=micro_data, out=tmp_path / "run", pretrained=parts)
    found = {one.step: one for one in estimate_steps(pipeline)}
    for stage in PRETRAINED:
        assert (found[stage].num_parameters, found[stage].num_tokens, found[stage].seconds) == (0, 0, 0)
        # float32, as they must not be rounded
        assert found[stage].disk_bytes >= sum(4 * weight.numel() for weight in parts[stage].parameters()) > 0
    # 10 clips of a second
    assert found["tokens"].num_tokens == 10 * (40 * 5 + 50) and own["tokens"].num_tokens == 10 * (50 * 3 + 25)
    # 12 steps of 4 crops of a second, one coarse level of the preset's
    assert found["coarse"].num_tokens == 12 * 4 * 40 and own["coarse"].num_tokens == 12 * 4 * 50
    assert found["semantic"].num_parameters < own["semantic"].num_parameters
    assert all(one.seconds < 60 for one in found.values())
    assumed = {one.step: one.seconds for one in estimate_steps(pipeline, device="a100")}
    assert 0 < assumed["semantic"] < found["semantic"].seconds
    with pytest.raises(ValueError, match="no estimate for the device 'b52'; choose one of: t4, "):
        estimate(pipeline, "codec", device="b52")
    assert "times of a h100 at 30% of 989 TFLOP/s" in estimate(pipeline, "codec", device="h100")
    table = estimate(pipeline)
    assert table.count("  pretrained\n") == 3 and not (tmp_path / "run").exists()


class Unregistered(Codec):
    """A codec that no file can hold."""

    target_sample_hz, downsample_factor, channels, num_quantizers, codebook_size = 16000, 320, 1, 4, 16

    def fingerprint(self): ...
    def tokenize(self, wave, lengths=None): ...
    def decode_from_codebook_indices(self, codes, num_samples=None): ...


def test_incompatible_parts_are_refused_before_training(parts, micro_data, tmp_path):
    """Wrong classes, too few levels and incompatible rates raise an error, and nothing is written."""
    codec, tokenizer, _ = (parts[stage] for stage in PRETRAINED)
    thin = build_codec(replace(MICRO, codec=replace(MICRO.codec, num_quantizers=2)))
    # frames of 322 samples at 16 kHz and tokens of 25 Hz begin together every 6.44 s
    odd = build_codec(replace(MICRO, codec=replace(MICRO.codec, hop_samples=322)))
    cases = [
        ({"coarse": codec}, "coarse accepts no pretrained module; pass one for: codec, semantic-tokenizer, mulan"),
        ({"codec": tokenizer}, "the pretrained codec must be a Codec, got a KMeansTokenizer"),
        ({"semantic-tokenizer": codec}, "pretrained semantic-tokenizer must be a SemanticTokenizer, got a SoundStream"),
        ({"mulan": codec}, "pretrained mulan must be a JointEmbedding, got a SoundStream"),
        ({"codec": Unregistered()}, "codec Unregistered cannot be saved"),
        ({"codec": thin}, "codec has 2 levels, but the preset .* needs 3; pass a codec with more levels"),
        (
            {"codec": odd},
            "every 6.44 s, but the training crops of coarse last 1 s; pass a codec and a semantic tokenizer whose",
        ),
    ]
    for passed, message in cases:
        with pytest.raises(ValueError, match=message):
            Pipeline(MICRO, data=micro_data, out=tmp_path / "run", pretrained=passed)
    assert not (tmp_path / "run").exists()
    state = torch.random.get_rng_state()
    check_pretrained(MICRO, {"codec": codec})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_results_of_another_kind_are_refused(parts, pretrained_run, micro_data, tmp_path):
    """A codec in the place of a semantic tokenizer raises an error, in the folder of a run and of a model."""
    assert not isinstance(parts["codec"], SemanticTokenizer)
    out = shutil.copytree(pretrained_run[0], tmp_path / "run")
    for wrong in (out / "semantic-tokenizer" / "model", out / "model" / "semantic_tokenizer"):
        shutil.rmtree(wrong)
        shutil.copytree(out / "codec" / "model", wrong)
    with pytest.raises(ValueError, match="semantic_tokenizer holds a SoundStream, but a SemanticTokenizer is needed"):
        MusicLM.from_pretrained(out)
    with pytest.raises(ValueError, match="model holds a SoundStream, but a SemanticTokenizer is needed"):
        Pipeline(MICRO, data=micro_data, out=out, pretrained=parts).tokens()


def write_encodec(folder: Path, channels: int) -> Path:
    """A folder in the published format of EnCodec, with 100 frames a second and 4 levels of 1024 codes."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(num_filters=4, hidden_size=8, upsampling_ratios=[4, 2], num_lstm_layers=1, codebook_size=1024)
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        sampling_rate=800, target_bandwidths=[2.0, 4.0], audio_channels=channels, **sizes
    )
    model = transformers.EncodecModel(config)
    for name, tensor in model.state_dict().items():
        if name.endswith((".embed", ".embed_sum")):
            tensor.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2])
def test_a_published_codec_as_pretrained_part(parts, channels, tmp_path, low_rates):
    """The tokens are the codes of EnCodec, mono or stereo, and a stage learns them."""
    codec = Codec.from_pretrained(write_encodec(tmp_path / "encodec", channels))
    passed = {**parts, "codec": codec}
    pipeline = Pipeline(MICRO, data=write_clips(tmp_path / "data", 5), out=tmp_path / "run", pretrained=passed)
    list(pipeline.run("quantizer"))
    assert list(pipeline.run("fine"))[-1].step == "fine"
    kept = load_module(tmp_path / "run" / "codec" / "model")
    assert kept.fingerprint() == codec.fingerprint() and type(kept) is type(codec)
    shards = TokenShards(tmp_path / "run" / "tokens" / "train")
    wave = read_audio(pipeline.train_items[1].path, 800, channels)[0]
    expected = codec.tokenize(wave.expand(channels, -1)[None])[0]
    assert torch.equal(torch.from_numpy(shards[1]["acoustic"]).long(), expected) and expected.shape == (100, 4)
    fine = load_module(tmp_path / "run" / "fine" / "model")
    assert [float(stream.rate_hz) for stream in fine.layout.streams] == [100, 100]
    quantizer = load_module(tmp_path / "run" / "quantizer" / "model")
    assert fine.token_fingerprints == {"acoustic": codec.fingerprint(), "conditioner": quantizer.fingerprint()}


@pytest.mark.slow
def test_a_published_clap_as_pretrained_part(parts, tmp_path):
    """CLAP is not rounded in the quantizer."""
    pytest.importorskip("transformers")
    from musiclm_pytorch.mulan.joint import JointEmbedding
    from tests.musiclm_pytorch.mulan.test_clap import write_clap

    clap = JointEmbedding.from_pretrained(str(write_clap(tmp_path / "clap")))
    assert isinstance(clap, JointEmbedding)
    pipeline = Pipeline(
        MICRO, data=write_clips(tmp_path / "data", 5), out=tmp_path / "run", pretrained={**parts, "mulan": clap}
    )
    list(pipeline.run("quantizer"))
    list(pipeline.run("tokens"))
    assert load_module(tmp_path / "run" / "quantizer" / "model").mulan.fingerprint() == clap.fingerprint()
    assert TokenShards(tmp_path / "run" / "tokens" / "train")[0]["latents"].shape == (1, clap.dim_latent)
