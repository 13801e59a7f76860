"""`musiclm doctor` finds kernels that are wrong on a device, and names the part."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from audiolm_pytorch.checks import kernels
from audiolm_pytorch.nn.cached_transformer import CachedTransformer
from musiclm_pytorch.cli import checks as cli_checks

_attention, _conv, _step = F.scaled_dot_product_attention, F.conv1d, CachedTransformer.step


def _wrong_attention(queries, *others, **options):
    """Attention whose last head is wrong, except in float64."""
    result = _attention(queries, *others, **options)
    return result if queries.dtype == torch.float64 else torch.cat((result[:, :-1], result[:, -1:] * 0.8), dim=1)


def _wrong_conv(x, *others, **options):
    """Convolution with a wrong last channel, except in float64."""
    result = _conv(x, *others, **options)
    return result if x.dtype == torch.float64 else torch.cat((result[..., :-1, :], 2 * result[..., -1:, :]), dim=-2)


# Broken kernel -> owner, attribute, the broken version, a pattern of a line that must be there, and one that must not.
BROKEN = {
    "attention": (
        *(F, "scaled_dot_product_attention", _wrong_attention),
        r"causal attention +WRONG.*semantic stage +WRONG.*first wrong in \S+attention \(SelfAttention\)",
        "conv.* WRONG",
    ),
    "convolution": (F, "conv1d", _wrong_conv, r"strided convolution +WRONG", "attention.* WRONG"),
    "decoding": (
        *(CachedTransformer, "step", lambda self, x, rows: _step(self, x, [max(row - 1, 0) for row in rows])),
        *(r"decoding of the semantic stage +WRONG", "\nsemantic stage +WRONG"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", BROKEN)
def test_a_broken_kernel_is_found_and_named(kernel, musiclm_command, micro_run, monkeypatch, capsys):
    """A kernel that is wrong in float32 but right in float64 ends with exit status 2 and one line on standard error."""
    owner, name, broken, expected, unexpected = BROKEN[kernel]
    monkeypatch.setattr(owner, name, broken)
    assert musiclm_command("doctor", "--model", micro_run / "model", "--device", "cpu") == 2
    printed = capsys.readouterr()
    assert re.search(expected, printed.out, re.DOTALL) and not re.search(unexpected, printed.out)
    assert re.fullmatch(r"musiclm: the device cpu computes wrong results \(.*\); update torch\n", printed.err)


@pytest.mark.slow
def test_this_machine_is_right(musiclm_command, micro_run, capsys):
    """Kernels, codec, tokenizer, MuLaN, quantizer, stages and decoding of the CPU are right."""
    assert musiclm_command("doctor", "--model", micro_run / "model", "--device", "cpu", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_right"] and len(report["checks"]) >= 30
    names = {check["name"] for check in report["checks"]}
    assert {"codec encoder", "MuLaN quantizer", "decoding of the coarse stage"} <= names


def test_a_wrong_device_is_refused(monkeypatch):
    """Commands do not use a device with a wrong kernel, such as MPS of some versions."""
    wrong = kernels.KernelCheck("attention with a mask", 0.3, False)
    monkeypatch.setattr(kernels, "check_kernels", lambda device: [wrong])
    with pytest.raises(ValueError, match=r"meta computes wrong results \(attention with a mask\); use --device cpu"):
        cli_checks.device_named("meta")
    assert cli_checks.device_named("cpu").type == "cpu"
