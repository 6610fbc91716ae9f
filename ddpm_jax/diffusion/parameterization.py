"""Parameterizations: what a network predicts of x_t = alpha x_0 + sigma eps, and the x0_hat that this stands for.

One row for each of eps, x0 and v, for one example and a scalar level. As both functions of a row are linear, all else
follows: x0_hat = c_skip x_t + c_out F (Karras et al. 2022, eq. 7), F the network's output, and the squared error of
x0_hat is c_out^2 times that of F.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ddpm_jax.diffusion.schedules import Level


@dataclasses.dataclass(frozen=True)
class Parameterization:
  """One row. Its functions take arrays of one shape, of JAX or NumPy, or numbers; they are each other's inverse.

  Attributes:
    target: (x0, eps, level) -> the network's regression target at x_t.
    x0_hat: (output, x_t, level) -> the estimate of x_0 that the output stands for; sigma > 0.
  """

  target: Callable[[Any, Any, Level], Any]
  x0_hat: Callable[[Any, Any, Level], Any]

  def c_out(self, level: Level) -> Any:
    """The factor of the network's output in x0_hat.

    >>> float(PARAMETERIZATIONS["v"].c_out(Level(alpha=0.8, sigma=0.6, time=0)))
    -0.6
    """
    return self.x0_hat(1.0, 0.0, level)


PARAMETERIZATIONS = {
  "eps": Parameterization(
    target=lambda x0, eps, level: eps,
    x0_hat=lambda output, xt, level: (xt - level.sigma * output) / level.alpha,  # Ho et al. 2020, eq. 15
  ),
  "x0": Parameterization(
    target=lambda x0, eps, level: x0,
    x0_hat=lambda output, xt, level: output,
  ),
  "v": Parameterization(  # Salimans and Ho 2022, section 4 and appendix D; alpha^2 + sigma^2 = 1
    target=lambda x0, eps, level: level.alpha * eps - level.sigma * x0,
    x0_hat=lambda output, xt, level: level.alpha * xt - level.sigma * output,
  ),
}
