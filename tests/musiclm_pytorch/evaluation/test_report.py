"""Metrics with intervals, and reports."""

import json
import math
import re

import numpy as np
import pytest

from musiclm_pytorch.evaluation.report import (
    MetricValue,
    accuracy_metric,
    bootstrap_interval,
    markdown_table,
    write_report,
)


def test_balanced_accuracy_of_constant_answers_is_chance():
    """The frequent class as constant answer has a high accuracy, but no balanced accuracy above chance."""
    truth = ["no"] * 90 + ["yes"] * 10
    metric = accuracy_metric("drums", truth, ["no"] * 100)
    assert (metric.value, metric.chance, metric.count) == (0.9, 0.5, 100)
    assert accuracy_metric("drums", truth, ["no"] * 100, balanced=True).value == 0.5


def test_bootstrap_interval_is_that_of_the_binomial():
    """The interval has the width of theory, contains the share, and is deterministic."""
    hits = np.arange(400) % 4 == 0
    low, high = bootstrap_interval(lambda chosen: float(hits[chosen].mean()), 400)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.01)
    assert high == pytest.approx(0.25 + half, abs=0.01)
    assert bootstrap_interval(lambda chosen: float(hits[chosen].mean()), 400) == (low, high)


def test_report_writes_json_and_table(tmp_path):
    """Both files hold every metric with its chance and number of items."""
    metrics = [MetricValue("a / b", 0.5, 0.4, 0.6, 0.1, 20, "x|y"), MetricValue("c", 2.0, 1.0, 3.0, None, 5)]
    write_report(tmp_path / "metrics.json", metrics, {"seed": 0})
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["settings"] == {"seed": 0}
    assert written["metrics"][0]["chance"] == 0.1
    table = (tmp_path / "metrics.md").read_text()
    assert table == markdown_table(metrics)
    assert "| a / b | 0.500 | 0.400 to 0.600 | 0.100 | 20 | x/y |" in re.sub(" +", " ", table)
    with pytest.raises(ValueError, match="json"):
        write_report(tmp_path / "metrics.txt", metrics, {})
