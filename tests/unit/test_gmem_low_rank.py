"""Low-rank banks: made in passes, as good as numpy's SVD of the whole bank; the randomised one within a stated factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpc_gen.methods.gmem.bank import LowRankBank
from hpc_gen.methods.gmem.low_rank import Directions, Randomised, exact, randomised
from hpc_gen.runtime.errors import UserError

N, E, R = 500, 60, 8
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "decays as snippets do": lambda j: (1 + j) ** -0.7,
    "decays fast": lambda j: 0.6**j,
    "a step": lambda j: torch.where(j < R, 10.0, 1.0),
    "white noise": lambda j: torch.ones_like(j),
}


def bank(spectrum: str, seed: int = 0, rows: int = N) -> Tensor:
    """Rows whose centred singular values are about the spectrum, around a mean far from zero."""
    generator = torch.Generator().manual_seed(seed)
    values = SPECTRA[spectrum](torch.arange(E, dtype=torch.float64))
    turn = torch.linalg.qr(torch.randn(E, E, generator=generator, dtype=torch.float64)).Q
    mean = 3 * torch.randn(E, generator=generator, dtype=torch.float64)
    return (torch.randn(rows, E, generator=generator, dtype=torch.float64) * values @ turn.T + mean).float()


def passes(rows: Tensor, piece: int) -> Callable[[], Iterator[Tensor]]:
    return lambda: iter(rows.split(piece))


def best(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right vectors [E, E] of the centred rows, by numpy."""
    wide = rows.double().numpy()
    _, values, vectors = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    return values, vectors.T


def error(rows: Tensor, found: Directions) -> float:
    """Root of the squares of what the directions leave of the rows."""
    centred = rows.double() - rows.double().mean(dim=0)
    return float((centred - centred @ found.right @ found.right.T).norm())


@pytest.mark.parametrize("piece", [1, 7, 64, N])
def test_exact_is_the_svd_whatever_the_pieces(piece: int) -> None:
    rows = bank("decays as snippets do")
    found = exact(passes(rows, piece), R)
    values, vectors = best(rows)
    assert np.allclose(found.singular_values.numpy(), values[:R], rtol=1e-10)
    overlap = np.abs((found.right.numpy() * vectors[:, :R]).sum(axis=0))
    assert np.allclose(overlap, 1, atol=1e-9)
    assert torch.allclose(found.mean, rows.double().mean(dim=0), rtol=1e-12, atol=1e-12)
    assert found.held == pytest.approx((values[:R] ** 2).sum() / (values**2).sum(), rel=1e-10)
    assert error(rows, found) == pytest.approx(np.sqrt((values[R:] ** 2).sum()), rel=1e-9)


def test_coefficients_of_pieces_are_those_of_the_whole() -> None:
    rows = bank("decays fast")
    found = exact(passes(rows, 33), R)
    parts = torch.cat([found.coefficients(piece) for piece in rows.split(50)])
    whole = LowRankBank.of(rows, R)
    assert torch.allclose(parts, whole.coefficients, rtol=1e-5, atol=1e-6) and parts.dtype == torch.float32
    assert torch.allclose(parts @ found.basis.T + found.mean.float(), whole.decode(whole.coefficients), atol=1e-5)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_randomised_leaves_nearly_the_least(spectrum: str) -> None:
    """Within 1.01 of the best with two iterations (1.03 of white noise, which has no best directions to find)."""
    for seed in range(5):
        rows = bank(spectrum, seed)
        least = float(np.sqrt((best(rows)[0][R:] ** 2).sum()))
        found = randomised(passes(rows, 64), R, Randomised(seed=seed))
        assert least <= error(rows, found) * (1 + 1e-12)
        assert error(rows, found) <= (1.03 if spectrum == "white noise" else 1.01) * least, (spectrum, seed)
        assert torch.allclose(found.right.T @ found.right, torch.eye(R, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_randomised_without_iterations_keeps_the_bound_of_halko(spectrum: str) -> None:
    """Theorem 10.5 of Halko, Martinsson and Tropp (2011), in the mean over seeds."""
    rows = bank(spectrum)
    least = float(np.sqrt((best(rows)[0][R:] ** 2).sum()))
    options = [Randomised(oversampling=10, power_iterations=0, seed=seed) for seed in range(8)]
    errors = [error(rows, randomised(passes(rows, 100), R, each)) for each in options]
    assert np.mean(errors) <= np.sqrt(1 + R / 9) * least
    more = error(rows, randomised(passes(rows, 100), R, Randomised(power_iterations=6)))
    assert more <= min(errors) * 1.001, "iterations do not make it worse"


def test_randomised_finds_the_subspace_behind_a_gap() -> None:
    rows = bank("a step")
    values, vectors = best(rows)
    found = randomised(passes(rows, 64), R)
    cosines = np.linalg.svd(found.right.numpy().T @ vectors[:, :R], compute_uv=False)
    assert cosines.min() > 1 - 1e-6
    assert np.allclose(found.singular_values.numpy(), values[:R], rtol=1e-5)
    assert found.held == pytest.approx((values[:R] ** 2).sum() / (values**2).sum(), rel=1e-5)


def test_randomised_is_a_function_of_rows_and_seed() -> None:
    rows = bank("decays as snippets do")
    one, same, other = (randomised(passes(rows, 64), R, Randomised(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(one.right, same.right) and torch.equal(one.singular_values, same.singular_values)
    assert not torch.equal(one.right, other.right)
    assert torch.allclose(one.right, other.right, atol=0.2), "signs are the same"
    cut = randomised(passes(rows, 17), R)
    assert torch.allclose(one.right, cut.right, atol=1e-9)


def test_full_rank_is_the_bank_itself() -> None:
    rows = bank("decays as snippets do", rows=200)
    for found in (exact(passes(rows, 30), E), randomised(passes(rows, 30), E)):
        decoded = found.coefficients(rows) @ found.basis.T + found.mean.float()
        assert torch.allclose(decoded, rows, atol=1e-4) and found.held == pytest.approx(1.0)


@pytest.mark.parametrize("method", [exact, randomised])
def test_ranks_that_the_rows_do_not_have_are_refused(method: Callable[..., Directions]) -> None:
    rows = bank("decays fast", rows=20)
    for rank in (0, 21, -1):
        with pytest.raises(UserError, match=f"a bank of 20 rows of 60 has no rank {rank}; give 1 to 20"):
            method(passes(rows, 7), rank)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(100, 3, generator=generator) @ torch.randn(3, E, generator=generator)
    assert method(passes(flat, 9), 3).held == pytest.approx(1.0)
    with pytest.raises(UserError, match="the bank's rows span fewer than 5 directions; give a smaller rank"):
        method(passes(flat, 9), 5)
    with pytest.raises(UserError, match="span fewer than 1 directions"):
        method(passes(torch.ones(10, E), 3), 1)


@pytest.mark.parametrize("options", [{"oversampling": -1}, {"power_iterations": -1}, {"seed": -1}])
def test_options_below_zero_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} of a low-rank bank is -1; give 0 or more"):
        Randomised(**options)
