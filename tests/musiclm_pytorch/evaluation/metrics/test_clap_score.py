"""The CLAP score against transformers' own model and feature extractor."""

import pytest
import torch

from audiolm_pytorch.audio.files import write_audio
from audiolm_pytorch.data.manifest import load_items
from musiclm_pytorch.evaluation.joint_embedder import JointEmbedder
from musiclm_pytorch.evaluation.metric import ClipSet, extract
from musiclm_pytorch.evaluation.metrics.text_similarity import TextSimilarity
from musiclm_pytorch.mulan.joint import JointEmbedding


@pytest.mark.slow
def test_clap_score_agrees_with_transformers(tmp_path):
    """The mean cosine of transformers' audio and text embeddings, from the folder of a CLAP model."""
    transformers = pytest.importorskip("transformers")
    from tests.musiclm_pytorch.mulan.test_clap import HZ, TEXTS, sound, theirs, write_clap

    folder = write_clap(tmp_path / "clap")
    for number, text in enumerate(TEXTS):
        write_audio(tmp_path / "clips" / f"{number}.flac", sound(2.0, number), HZ)
        (tmp_path / "clips" / f"{number}.txt").write_text(text, encoding="utf-8")
    items = load_items(tmp_path / "clips").items
    embedder = JointEmbedder(JointEmbedding.from_pretrained(str(folder)), "CLAP")
    clips = ClipSet("clips", items, extract(items, [embedder]))
    value = TextSimilarity(embedder).measure(clips, None, None)[0]
    audio = torch.nn.functional.normalize(theirs(folder, [sound(2.0, n) for n in range(len(TEXTS))]), dim=-1)
    model = transformers.ClapModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.text_model(**inputs).pooler_output
        texts = torch.nn.functional.normalize(model.text_projection(states), dim=-1)
    # The files have 16 bits.
    assert value.value == pytest.approx(float((audio * texts).sum(dim=1).mean()), abs=1e-3)
    assert "CLAP" in value.note and value.chance is not None
