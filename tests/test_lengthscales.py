"""Metrics on input gradients: streamed PCA and both published averages."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.decomposition import PCA
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import identity_lengthscale, pca_lengthscale, tuned_lengthscale


def data(points=60, features=5, offset=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.2, 3.0, features, dtype=dtype)
    x = torch.randn(points, features, dtype=dtype, generator=generator) * scales
    mixing = torch.randn(features, features, dtype=dtype, generator=generator)
    return x @ mixing + offset


def metric_matrix(metric):
    """U Sigma^-1 U^T, which does not depend on signs of eigenvectors."""
    return metric.rotation @ torch.diag(metric.precision) @ metric.rotation.T


def test_streamed_equals_one_eigh_of_the_whole():
    x = data() + 1e3
    covariance = torch.cov(x.T)
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=7)
    for metric in (pca_lengthscale(x), pca_lengthscale(loader), pca_lengthscale(x.split(11))):
        torch.testing.assert_close(metric_matrix(metric), covariance, rtol=1e-10, atol=1e-10)
        eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
        torch.testing.assert_close(metric.precision, eigenvalues, rtol=1e-10, atol=1e-12)


def test_uncentred_is_the_second_moment_of_the_published_code():
    x = data()
    expected = x.T @ x / (len(x) - 1)
    metric = pca_lengthscale(x.split(13), center=False)
    torch.testing.assert_close(metric_matrix(metric), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_tuned_averages_as_published(alpha):
    x = data()
    pca = pca_lengthscale(x)
    precision = tuned_lengthscale(x, alpha).precision
    torch.testing.assert_close(precision, (1 - alpha) + alpha * pca.precision)
    precision = tuned_lengthscale(x, alpha, average="lengthscale").precision
    expected = 1 / (alpha / pca.precision + (1 - alpha))
    torch.testing.assert_close(precision, expected)


def test_constant_features_get_no_weight_and_no_nan():
    x = data()
    x[:, 2] = 4.0
    for metric in (
        pca_lengthscale(x),
        tuned_lengthscale(x, 0.3, average="lengthscale"),
        tuned_lengthscale(x, 0.0, average="lengthscale"),
    ):
        assert metric.precision.isfinite().all()
    assert pca_lengthscale(x).precision[-1].abs() < 1e-10
    assert (tuned_lengthscale(x, 0.0, average="lengthscale").precision == 1).all()


def test_distances_after_the_map_are_those_of_the_metric():
    x = data()
    metric = pca_lengthscale(x)
    s = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=-1)
    r = metric(s)
    for i in range(4):
        for j in range(4):
            expected = (s[i] - s[j]) @ torch.cov(x.T) @ (s[i] - s[j])
            assert ((r[i] - r[j]) ** 2).sum().item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("wanted", [1, 3, 5, 0.5, 0.9, 0.999, 1 - 1e-16, 1e-9])
@pytest.mark.parametrize("center", [True, False])
def test_leading_components(wanted, center):
    """As many as scikit-learn's PCA keeps, and the bound on what is missing."""
    x = data(offset=0.3)
    whole = pca_lengthscale(x, center=center)
    metric = pca_lengthscale(x.split(7), center=center, num_components=wanted)
    keep = len(metric.precision)
    assert metric.rotation.shape == (5, keep)
    assert metric.num_features == whole.num_features == 5
    if isinstance(wanted, int):
        assert keep == wanted
    elif center:
        known = PCA(n_components=wanted, svd_solver="full").fit(x.numpy())
        assert keep == known.n_components_
    s = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1)
    missing = torch.cdist(whole(s), whole(s)) ** 2 - torch.cdist(metric(s), metric(s)) ** 2
    assert missing.min() > -1e-10
    left_out = whole.precision[keep:]
    assert missing.max() <= 4 * (left_out[0] if len(left_out) else 0) + 1e-10
    half = metric.to(s.float())
    assert half.rotation.dtype == torch.float32
    assert half(s.float()).shape == (6, keep)


def test_components_of_data_that_are_all_alike():
    metric = pca_lengthscale(torch.ones(4, 3), num_components=0.9)
    assert len(metric.precision) in (1, 2, 3)
    assert (metric.precision == 0).all()


def test_identity_changes_nothing_and_casts():
    s = torch.randn(3, 5)
    assert identity_lengthscale()(s) is s
    metric = pca_lengthscale(data()).to(s)
    assert metric.precision.dtype == metric.rotation.dtype == torch.float32
    assert metric(s).dtype == torch.float32


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    points=st.integers(2, 40),
    features=st.integers(1, 6),
    batch=st.integers(1, 9),
    image=st.booleans(),
)
def test_any_batching_gives_the_same_metric(points, features, batch, image):
    x = data(points, features)
    shaped = x.reshape(points, features, 1) if image else x
    whole, streamed = pca_lengthscale(x), pca_lengthscale(shaped.split(batch))
    torch.testing.assert_close(metric_matrix(streamed), metric_matrix(whole), rtol=1e-9, atol=1e-9)
