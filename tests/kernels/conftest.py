"""Which divergences the tests run for."""

# Every divergence at its default, at a lopsided beta, at the ends where formulas change, and near them.
VARIANTS = [
    ("forward_kl", None),
    ("reverse_kl", None),
    *(("symmetric_kl", beta) for beta in (0.0, 0.3, 1.0)),
    *(("jsd", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    *(("skew_forward_kl", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    *(("skew_reverse_kl", beta) for beta in (0.0, 1e-6, 1e-3, 0.1, 0.5, 1 - 1e-3, 1 - 1e-6, 1.0)),
    ("tvd", None),
]


def pytest_generate_tests(metafunc):
    """Tests that take `divergence` and `beta` run for every variant; `divergence` alone for every default."""
    names = metafunc.fixturenames
    if "divergence" in names and "beta" in names:
        metafunc.parametrize(("divergence", "beta"), VARIANTS)
    elif "divergence" in names:
        metafunc.parametrize(
            "divergence",
            ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"],
        )
