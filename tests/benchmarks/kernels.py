"""The kernels of `nn/` that are tuned by hand, compared with plain torch in the same run.

`python tests/benchmarks/kernels.py [--threads 2]` needs a minute on idle cores. Each number is the time of plain torch
divided by the time of the kernel, the median of five rounds that alternate between both. A kernel that does not win 1.3
times on any kind of machine is removed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from audiolm_pytorch.nn.attention import attend
from audiolm_pytorch.nn.layers import Dropout, GatedFeedForward, RMSNorm
from audiolm_pytorch.nn.row_products import RowProduct, prepare_norm

ROUNDS = 5


def main() -> None:
    """Measure all kernels and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; plain torch / kernel")
    with torch.inference_mode():
        for dim_in, dim_out in ((192, 576), (192, 1536), (768, 192), (512, 1536), (512, 2730), (1365, 512)):
            ratios = [f"{row_product(dim_in, dim_out, rows):6.2f}" for rows in (1, 2, 4, 8)]
            print(f"product of 1, 2, 4, 8 rows, {dim_in} x {dim_out}:", *ratios)
        print(f"norm of one row, width 512: {row_norm():6.2f}")
        print(f"attention over 96 of 128 positions, 8 rows of 3 heads: {row_attention():6.2f}")
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            print(f"norm, forward and backward, {name}: {trained_norm():6.2f}")
            print(f"dropout, {name}: {dropout(dtype):6.2f}")
            print(f"gated feed-forward layer, forward and backward, {name}: {trained_feed_forward():6.2f}")
    print(f"causal attention, forward and backward, bfloat16: {trained_attention():6.2f}")


def ratio(plain: Callable[[], object], kernel: Callable[[], object], repeats: int) -> float:
    """Time of `plain` divided by the time of `kernel`."""
    rounds = []
    for _ in range(ROUNDS + 1):
        times = []
        for function in (plain, kernel):
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            times.append(time.perf_counter() - start)
        rounds.append(times[0] / times[1])
    return statistics.median(rounds[1:])


def row_product(dim_in: int, dim_out: int, num_rows: int) -> float:
    """Prepared products of `num_rows` rows with weights of 24 MB in turn, compared with `F.linear`."""
    weights = [torch.randn(dim_out, dim_in) for _ in range(6 * 2**20 // (dim_in * dim_out))]
    x, out = torch.randn(num_rows, dim_in), torch.zeros(num_rows, dim_out)
    products = [RowProduct(weight, None, x, out) for weight in weights]
    return ratio(lambda: [F.linear(x, weight) for weight in weights], lambda: [product() for product in products], 5)


def row_attention() -> float:
    """Attention of 24 heads over 96 of 128 cached positions of 6 layers, without gaps compared with gaps."""
    query, scores, out = torch.randn(24, 1, 64), torch.zeros(24, 1, 96), torch.zeros(24, 1, 64)
    with_gaps = [torch.randn(2, 24, 128, 64)[:, :, :96] for _ in range(6)]
    without_gaps = [cache.contiguous() for cache in with_gaps]
    other_weights = torch.zeros(4 * 2**20)  # read between two rows, as those of the other layers of a model

    def attend_to(caches: list[Tensor]) -> None:
        other_weights.add_(1)
        for keys, values in caches:
            torch.softmax(torch.bmm(query, keys.mT, out=scores), -1, out=scores)
            torch.bmm(scores, values, out=out)

    return ratio(lambda: attend_to(with_gaps), lambda: attend_to(without_gaps), 20)


def row_norm() -> float:
    """A prepared norm of a row, compared with `F.rms_norm`."""
    norm, x = RMSNorm(512), torch.randn(1, 512)
    return ratio(lambda: norm(x), prepare_norm(norm, x, torch.zeros_like(x)), 2000)


def trained_norm() -> float:
    """Forward and backward pass of the norm, compared with `nn.RMSNorm`."""
    x = torch.randn(16, 250, 192, requires_grad=True)
    return ratio(backward(nn.RMSNorm(192, eps=1e-6), x), backward(RMSNorm(192), x), 20)


def dropout(dtype: torch.dtype) -> float:
    """Dropout in training mode, compared with `nn.Dropout`."""
    x = torch.randn(16, 250, 768, dtype=dtype)
    return ratio(lambda: nn.Dropout(0.1)(x), lambda: Dropout(0.1)(x), 5)


def trained_feed_forward() -> float:
    """Forward and backward pass of the gated feed-forward layer, compared with the same operators under autograd."""
    layer, x = GatedFeedForward(192, 768), torch.randn(16, 250, 192, requires_grad=True)

    def plain(x: Tensor) -> Tensor:
        value, gate = layer.up(x).chunk(2, dim=-1)
        out: Tensor = layer.down(F.silu(gate) * value)
        return out

    return ratio(backward(plain, x), backward(layer, x), 5)


def trained_attention() -> float:
    """Forward and backward pass of causal attention, compared with the fused kernel of torch."""
    parts = [torch.randn(16, 3, 258, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    fused = backward(lambda x: F.scaled_dot_product_attention(x, *parts[1:], is_causal=True), parts[0])
    return ratio(fused, backward(lambda x: attend(x, *parts[1:], is_causal=True), parts[0]), 5)


def backward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward pass of `function` on `x`."""
    return lambda: function(x).sum().backward()


if __name__ == "__main__":
    main()
