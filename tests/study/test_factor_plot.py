"""The picture of rotation factors: it is drawn, whatever the curves are called."""

from irope_jax.study.factor_plot import plot_factors


def test_a_picture_is_made(tmp_path):
    curves = {"pi": [4.0] * 8, "yarn": [1, 1, 1, 2, 3, 4, 4, 4], "searched": [1, 1, 1.2, 2, 3.1, 4, 4.4, 5.0]}
    path = plot_factors(tmp_path / "factors.png", curves, factor=4.0, critical_pair=4)
    assert path.stat().st_size > 10_000
    other = plot_factors(tmp_path / "other.png", {"one": [1.0, 2.0]}, factor=2.0)
    assert other.read_bytes() != path.read_bytes()
