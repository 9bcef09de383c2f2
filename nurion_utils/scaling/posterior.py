"""The posterior of a calibration: its maximum, and draws from it.

The draws are by importance resampling (Rubin 1987) from a t distribution about the maximum, which is fitted to its own
weighted draws some times over (population Monte Carlo; Cappe et al. 2004).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Of a run's scatter, believed or stated, how wrong it may be either way (of its logarithm).
SCATTER_SPREAD = 0.5
DRAWS, _PROPOSALS, _ROUNDS = 500, 4000, 4
_FREEDOM = 5.0  # of the t distribution that proposes: wider tails than a normal one's


def fit(
    errors: Callable[[np.ndarray], np.ndarray], prior: np.ndarray, believed: float, runs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The most probable figures, their covariance about it, and draws of them and of the scatter, in logarithms.

    `errors` has the logarithm of ours by measured, (..., runs) for figures (..., figures); `prior` the figures' means
    and variances, and `believed` the scatter of runs that is stated. Returns arrays of shape (figures,),
    (figures, figures) and (DRAWS, figures + 1).
    """
    mean, covariance, scatter = _maximum(errors, prior, believed, runs)
    rng, size = np.random.default_rng(0), len(mean) + 1
    spread = np.zeros((size, size))
    spread[:-1, :-1], spread[-1, -1] = covariance, SCATTER_SPREAD**2
    centre, first = np.append(mean, np.log(scatter)), spread
    for _ in range(_ROUNDS):
        normal = rng.standard_normal((_PROPOSALS, size))
        wide = normal * np.sqrt(_FREEDOM / rng.chisquare(_FREEDOM, (_PROPOSALS, 1)))
        proposed = centre + wide @ np.linalg.cholesky(spread).T
        density = -0.5 * (_FREEDOM + size) * np.log1p((wide**2).sum(axis=1) / _FREEDOM)
        weight = _log_posterior(errors, prior, believed, runs, proposed) - density
        weight = np.exp(weight - weight.max())
        weight /= weight.sum()
        centre = weight @ proposed
        apart = proposed - centre
        spread = (weight * apart.T) @ apart + first * (weight**2).sum()  # of few proposals that count the first one
    # Systematic resampling: evenly through the sum of the weights.
    at = np.searchsorted(np.cumsum(weight), (np.arange(DRAWS) + 0.5) / DRAWS)
    return mean, covariance, proposed[np.minimum(at, _PROPOSALS - 1)]


def _log_posterior(
    errors: Callable[[np.ndarray], np.ndarray], prior: np.ndarray, believed: float, runs: int, at: np.ndarray
) -> np.ndarray:
    figures, scatter = at[:, :-1], at[:, -1]
    logarithm = -0.5 * ((figures - prior[0]) ** 2 / prior[1]).sum(axis=1)
    logarithm -= 0.5 * ((scatter - np.log(believed)) / SCATTER_SPREAD) ** 2
    return logarithm - runs * scatter - 0.5 * (errors(figures) ** 2).sum(axis=1) * np.exp(-2 * scatter)


def _maximum(
    errors: Callable[[np.ndarray], np.ndarray], prior: np.ndarray, believed: float, runs: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The most probable figures, their covariance there, and the scatter, which is fitted in turn with them."""
    from scipy.optimize import least_squares

    def residuals(figures: np.ndarray, scatter: float) -> np.ndarray:
        return np.concatenate([errors(figures[None])[0] / scatter, (figures - prior[0]) / np.sqrt(prior[1])])

    mean, scatter = prior[0], believed
    for _ in range(8):
        solution = least_squares(residuals, mean, args=(scatter,))
        mean, covariance = solution.x, np.linalg.inv(solution.jac.T @ solution.jac)
        # What runs have to say of the scatter is less by the figures that they settle (MacKay 2003, chapter 28).
        free = max(0.0, runs - len(mean) + (np.diag(covariance) / prior[1]).sum())
        scatter = _scatter(float((errors(mean[None]) ** 2).sum()), free, believed)
    return mean, covariance, scatter


def _scatter(squares: float, free: float, believed: float) -> float:
    """The most probable scatter, of so large a sum of squared errors of which so many are free."""
    from scipy.optimize import minimize_scalar

    def minus_log(u: float) -> float:
        return free * u + 0.5 * squares * np.exp(-2 * u) + 0.5 * ((u - np.log(believed)) / SCATTER_SPREAD) ** 2

    return float(np.exp(minimize_scalar(minus_log).x))
