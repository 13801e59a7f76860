import pytest
import torch
from sklearn.linear_model import LogisticRegression

from musiclm_pytorch.evaluation.probes import fit_linear_probe, histogram, token_probe


def planted(num_rows, seed, num_classes=4, dim=12):
    """Noise [m, d] of very different scales, in which the label moves one direction each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    features = torch.randn(num_rows, dim, generator=generator)
    features[:, :num_classes] += 3.0 * torch.nn.functional.one_hot(labels, num_classes)
    scales = torch.logspace(-3, 3, dim)[torch.randperm(dim, generator=torch.Generator().manual_seed(9))]
    return features * scales + 5.0 * scales, labels


def share(probe, inputs, labels):
    return float((probe.predict(inputs) == labels).float().mean())


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    """Planted labels are found on unseen rows whatever the scale of a dimension; shuffled ones are not."""
    (features, labels), (unseen, truth) = planted(2000, 0), planted(1000, 1)
    assert share(fit_linear_probe(features, labels, 4), unseen, truth) > 0.9
    shuffled = [labels[torch.randperm(2000)] for _ in range(8)]
    shares = [share(fit_linear_probe(features, wrong, 4), unseen, truth) for wrong in shuffled]
    assert sum(shares) / 8 < 0.35


def test_it_is_logistic_regression():
    """The same weights as scikit-learn's, whose loss is the sum over rows plus |w|^2 / (2 C)."""
    features, labels = planted(300, 2)
    probe = fit_linear_probe(features, labels, 4, l2=1e-2, max_iterations=500)
    standardised = (features - features.mean(0)) / features.std(0, correction=0)
    oracle = LogisticRegression(C=1 / (2 * 300 * 1e-2), tol=1e-8, max_iter=2000).fit(standardised, labels)
    wanted = torch.from_numpy(oracle.coef_).float()
    assert torch.allclose(probe.weight.T, wanted, atol=5e-3)
    unseen = planted(200, 3)[0]
    by_oracle = torch.from_numpy(oracle.predict(((unseen - features.mean(0)) / features.std(0, correction=0)).numpy()))
    assert torch.equal(probe.predict(unseen), by_oracle)


def test_a_linear_probe_depends_on_nothing_but_its_data():
    """Two fits agree bit for bit, also without gradients around them, and the features are left as they were."""
    features, labels = planted(400, 4)
    before = features.clone()
    one = fit_linear_probe(features, labels, 4)
    torch.manual_seed(123)
    with torch.no_grad():
        two = fit_linear_probe(features, labels, 4)
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    assert torch.equal(features, before) and not one.weight.requires_grad


def test_class_weights_rescue_a_rare_class():
    """One row in twenty is 1: with weights its recall is like that of the other class, without it is not."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=generator) < 0.05).long()
    features = torch.randn(4000, 3, generator=generator) + rearranged(labels) * 1.5
    plain = fit_linear_probe(features, labels, 2)
    fair = fit_linear_probe(features, labels, 2, class_weights=torch.tensor([1 / 1.9, 10.0]))

    def recalls(probe):
        right = probe.predict(features) == labels
        return [float(right[labels == name].float().mean()) for name in (0, 1)]

    assert recalls(plain)[1] < 0.6 < min(recalls(fair))


def rearranged(labels):
    return labels.float()[:, None]


def test_a_dead_dimension_is_not_blown_up():
    """Rounding noise must not decide; features that are constant throughout give the commonest class."""
    features, labels = planted(500, 5)
    features[:, 7] = 1.0 + 1e-7 * torch.randn(500)
    probe = fit_linear_probe(features, labels, 4)
    assert probe.std[7] > 5e-7
    same = fit_linear_probe(torch.ones(9, 3), torch.tensor([0, 1, 1, 1, 1, 2, 2, 0, 1]), 3)
    assert same.predict(torch.ones(2, 3)).tolist() == [1, 1] and same.weight.isfinite().all()


def test_token_probe_is_a_majority_vote_that_falls_back_on_the_whole():
    """Each token stands for the class it meets most; one never met for the commonest, which also decides ties."""
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    labels = torch.tensor([1, 1, 2, 0, 2, 2, 2, 2])
    probe = token_probe(ids, labels, num_tokens=4, num_classes=3)
    assert probe.class_of_token.tolist() == [1, 2, 2, 2]
    assert probe.predict(torch.tensor([[3, 0], [1, 2]])).tolist() == [[2, 1], [2, 2]]


def test_histograms_are_square_roots_of_shares():
    """Padding is left out, norms are one, and an empty sequence gives zeros, not NaN."""
    ids = torch.tensor([[0, 0, 2, 0], [1, 2, -1, -1], [-1, -1, -1, -1]])
    wanted = torch.tensor([[0.75, 0, 0.25], [0, 0.5, 0.5], [0, 0, 0]]).sqrt()
    assert torch.allclose(histogram(ids, 3), wanted)
    assert torch.allclose(histogram(ids[0], 3), wanted[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_linear_probe(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), 2), "one int label"),
        (lambda: fit_linear_probe(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2), "at least one"),
        (lambda: fit_linear_probe(torch.zeros(2, 2), torch.tensor([0, 2]), 2), "0..1, got 0..2"),
        (lambda: fit_linear_probe(torch.full((2, 2), torch.nan), torch.tensor([0, 1]), 2), "finite"),
        (lambda: fit_linear_probe(torch.zeros(2, 2), torch.tensor([0, 1]), 2, l2=-1.0), "l2 >= 0"),
        (lambda: token_probe(torch.tensor([0, 4]), torch.tensor([0, 1]), 4, 2), "0..3"),
        (lambda: histogram(torch.tensor([0, 4]), 4), "0..3"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    """Wrong shapes and ranges are named instead of giving a metric."""
    with pytest.raises(ValueError, match=words):
        call()
    probe = fit_linear_probe(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), 2)
    with pytest.raises(ValueError, match=r"\[m, 3\]"):
        probe.predict(torch.zeros(2, 4))
