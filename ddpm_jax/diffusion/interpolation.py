"""Ways between two points in latent space, for one pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lerp(start: jax.Array, end: jax.Array, share: jax.Array) -> jax.Array:
  """(1 - share) start + share end: between diffused images (Ho et al. 2020, section 4.4), share in [0, 1].

  >>> lerp(jnp.zeros(2), jnp.asarray([4.0, 8.0]), 0.25).tolist()
  [1.0, 2.0]
  """
  return (1 - share) * start + share * end


def slerp(start: jax.Array, end: jax.Array, share: jax.Array) -> jax.Array:
  """Spherical interpolation between two noises (Song et al. 2021, appendix D.5), share in [0, 1].

  sin((1 - share) theta) / sin(theta) start + sin(share theta) / sin(theta) end, theta the angle between them. What
  lies between two draws from N(0, I) is then as long as they are, which `lerp` would make shorter.
  """
  cosine = jnp.vdot(start, end) / (jnp.linalg.norm(start) * jnp.linalg.norm(end))
  theta = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
  straight = jnp.sin(theta) < 1e-4  # parallel, or opposite, where there is no one way
  safe = jnp.where(straight, 1.0, jnp.sin(theta))
  curved = (jnp.sin((1 - share) * theta) * start + jnp.sin(share * theta) * end) / safe
  return jnp.where(straight, lerp(start, end, share), curved)
