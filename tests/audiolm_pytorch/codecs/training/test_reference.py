"""The watch over codec trainings: recorded healthy runs pass, recorded broken ones are told of, once and readably."""

import json
import logging

import pytest

from audiolm_pytorch.codecs.training import reference as reference_module
from audiolm_pytorch.codecs.training.reference import (
    Curves,
    draw_curves,
    packaged_reference,
    read_curves,
    write_reference,
)
from audiolm_pytorch.codecs.training.watch import CurveWatch

# Validations (mel distances, usages of the least used level) of real runs of 400 steps of a small spectral codec (4
# levels of 256, batches of 8 x 1 s), with the codes in use from step 50 on; then the distance of the average spectrum
# and the expected usage.
STEPS = (50, 100, 150, 200, 250, 300, 350, 400)
HEALTHY = {
    "folk tunes": (
        (1.23, 1.01, 0.94, 0.90, 0.87, 0.84, 0.86, 0.83),
        (0.012, 0.344, 0.703, 0.711, 0.738, 0.773, 0.777, 0.758),
        1.137,
        0.506,
    ),
    "spoken digits": (
        (1.64, 1.04, 0.87, 0.87, 0.77, 0.68, 0.65, 0.64),
        (0.008, 0.168, 0.254, 0.309, 0.371, 0.305, 0.539, 0.551),
        1.007,
        0.118,
    ),
}
BROKEN = {
    "learning rate 100 times too high": (
        (1.23, 1.32, 1.28, 1.22, 1.23, 1.23, 1.21, 1.21),
        (0.004, 0.008, 0.039, 0.035, 0.066, 0.043, 0.223, 0.105),
        1.137,
        0.506,
    ),
    "decoder frozen": (
        (1.48, 1.35, 1.31, 1.28, 1.25, 1.25, 1.24, 1.24),
        (0.023, 0.402, 0.449, 0.656, 0.754, 0.746, 0.805, 0.789),
        1.137,
        0.506,
    ),
    "codebooks dead": (
        (1.23, 1.22, 1.22, 1.21, 1.21, 1.21, 1.21, 1.21),
        (0.004,) * 8,
        1.137,
        0.506,
    ),
}
KINDS = {
    "learning rate 100 times too high": {"mel distance", "unused codes"},
    "decoder frozen": {"mel distance"},
    "codebooks dead": {"mel distance", "unused codes"},
}


def rows_of(run):
    """Rows as a run writes them."""
    distances, usages, average, expected = run
    rows = []
    for step, distance, usage in zip(STEPS, distances, usages, strict=True):
        rows.append({"step": step, "phase": "generator", "mel": distance, "commitment": 0.05, "usage_level_1": 0.5})
        rows[-1] |= {"skipped": 0}
        rows.append({"step": step, "phase": "valid", "mel_distance": distance, "mel_distance_of_average": average})
        rows[-1] |= {"usage_level_1": usage, "usage_level_2": 0.9, "usage_expected": expected}
    return rows


def watched(rows, num_train_steps=400, reference=None):
    watch = CurveWatch(num_train_steps, reference)
    for row in rows:
        watch(row)
    return watch


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_not_warned_of(name):
    """Smaller codecs, other data, fewer steps than the reference: all within its range."""
    assert watched(rows_of(HEALTHY[name])).warnings == {}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_runs_are_told_of(name, caplog):
    """By the middle of the run, once a kind, saying what was seen, what is healthy and what to try."""
    with caplog.at_level(logging.WARNING):
        watch = watched(rows_of(BROKEN[name]))
    assert set(watch.warnings) == KINDS[name]
    assert [record.message for record in caplog.records] == list(watch.warnings.values())
    for text in watch.warnings.values():
        assert int(text.split("step ")[1].split(" of ")[0]) <= 200
        assert "The reference run showed" in text and "Try " in text


def test_the_reference_is_within_its_own_range():
    """Rebuilt as rows, the reference's run raises no warning; the same run without progress does."""
    reference = packaged_reference()
    usage, codes_from = dict(reference.points["usage_lowest"]), reference.points["commitment"][0][0]
    rows = []
    for step, value in reference.points["valid_mel"]:
        row = {"step": step, "phase": "valid", "mel_distance": value, "mel_distance_of_average": 1.0}
        codes = {"usage_level_1": usage[step], "usage_expected": 1.0} if step in usage else {}
        rows += [{"step": step, "phase": "generator", **({"usage_level_1": 0.5} if step >= codes_from else {})}]
        rows += [row | codes]
    assert watched(rows, reference.num_train_steps).warnings == {}
    stuck = [row | ({"mel_distance": 0.97} if row["phase"] == "valid" else {}) for row in rows]
    assert set(watched(stuck, reference.num_train_steps).warnings) == {"mel distance"}
    # ten times as long a run is not expected to be anywhere sooner
    assert watched(rows, 10 * reference.num_train_steps).warnings == {}


def discriminator_rows(losses, every=100):
    return [{"step": (n + 1) * every, "phase": "discriminator", "loss": loss} for n, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "kinds"),
    [
        ((2.0, 1.95, 1.8, 1.6, 1.7, 1.65), set()),
        ((2.0, 2.0, 2.0, 2.0, 2.0), {"discriminators know nothing"}),
        ((2.0, 1.2, 0.4, 0.01, 0.001, 0.0), {"discriminators know everything"}),
        ((2.0, 1.5, 0.01, 1.4, 0.02, 1.3), set()),
    ],
)
def test_discriminators_that_teach_nothing_are_told_of(losses, kinds):
    """Stuck at 2 or collapsed to 0; not at their beginning, and not for single rows."""
    assert set(watched(discriminator_rows(losses), 1000).warnings) == kinds


def test_exploding_commitment_and_skipped_steps_are_told_of():
    """Five times its first value; more than a fiftieth of the steps skipped."""

    def rows(commitments, skipped):
        return [
            {"step": 100 * (n + 1), "phase": "generator", "commitment": value, "skipped": skip}
            for n, (value, skip) in enumerate(zip(commitments, skipped, strict=True))
        ]

    assert watched(rows((0.0, 0.06, 0.02, 0.05, 0.1), (0, 1, 1, 2, 2)), 1000).warnings == {}
    broken = watched(rows((0.0, 0.06, 0.4, 0.9, 7.0), (0, 9, 17, 30, 40)), 1000)
    assert set(broken.warnings) == {"commitment", "skipped steps"}
    assert watched(rows((None, None, None), (0, 0, 0)), 1000).warnings == {}


def test_rows_seen_again_after_a_resume_change_nothing(caplog):
    """The loop hands the earlier rows in again; each warning is still given once."""
    rows = rows_of(BROKEN["decoder frozen"])
    watch = CurveWatch(400)
    with caplog.at_level(logging.WARNING):
        for row in rows + rows[:6] + rows:
            watch(row)
    assert len(caplog.records) == 1


def test_figures_do_not_depend_on_loudness_or_size_of_the_validation():
    """What is compared are ratios: the same run on data of twice the distances and half the frames."""
    run = HEALTHY["folk tunes"]
    scaled = (tuple(2 * one for one in run[0]), tuple(one / 2 for one in run[1]), 2 * run[2], run[3] / 2)
    one, other = read_curves(rows_of(run)), read_curves(rows_of(scaled))
    for name in ("valid_mel", "train_mel", "usage_level_1"):
        assert [v for _, v in one.points[name]] == pytest.approx([v for _, v in other.points[name]], rel=1e-4)


def test_a_reference_is_written_read_and_drawn(tmp_path, monkeypatch):
    """Out of the metrics of a run into JSON and a picture; the packaged one reads the same way."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows_of(HEALTHY["folk tunes"])))
    written = write_reference(metrics, tmp_path / "reference.json", about="tunes")
    assert packaged_reference(tmp_path / "reference.json") == written
    assert written.num_train_steps == 400 and written.about == "tunes"
    assert written.points["valid_mel"][0] == (50, pytest.approx(1.23 / 1.137, abs=1e-4))
    assert packaged_reference().num_train_steps >= 1000 and packaged_reference().about
    with pytest.raises(ValueError, match="metrics.jsonl: no row of a validation"):
        metrics.write_text('{"step": 1, "phase": "main", "loss": 1.0}\n')
        read_curves(metrics)
    pytest.importorskip("matplotlib")
    draw_curves({"reference": packaged_reference(), "tunes": written}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_places_of_the_reference_follow_steps_and_share():
    """A value is compared with the reference at the earlier of its step and its share of the run."""
    curves = Curves(1000, {"valid_mel": [(step, step / 1000) for step in range(100, 1001, 100)]})
    assert curves.around("valid_mel", 400) == [0.2, 0.3, 0.4]
    assert curves.around("valid_mel", 50) == [] and curves.around("none", 50) == []
    assert max(CurveWatch(100, curves)._expected("valid_mel", 100)) == 0.1
    assert max(CurveWatch(10000, curves)._expected("valid_mel", 2000)) == 0.2
    assert reference_module.MEL_FACTOR > 1
