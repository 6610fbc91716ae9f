"""RePaint: its order of steps against the authors', and its draws against a conditional that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import samplers
from ddpm_jax.diffusion.denoiser import from_x0
from ddpm_jax.diffusion.inpainting import inpaint_after_row, repaint_jumps
from ddpm_jax.diffusion.schedules import make_schedule

SHORT = make_schedule("linear", 100, beta_start=1e-3, beta_end=0.2)


def schedule_jump(num_steps, jump_length, jump_n_sample):
  """`get_schedule_jump` of the authors' code, with its own names: levels T-1, ..., 0, -1, where -1 is the image."""
  jumps = {}
  for j in range(0, num_steps - jump_length, jump_length):
    jumps[j] = jump_n_sample - 1
  t, ts = num_steps, []
  while t >= 1:
    t -= 1
    ts.append(t)
    if jumps.get(t, 0) > 0:
      jumps[t] -= 1
      for _ in range(jump_length):
        t += 1
        ts.append(t)
  ts.append(-1)
  return ts


def walk(grid, jumps):
  """The levels that the rows pass, with every single step of a way up, numbered as the authors do."""
  place = {t: len(grid) - 2 - i for i, t in enumerate(grid)}
  levels = [place[jumps.t[0]]]
  for t, s, up in zip(jumps.t, jumps.s, jumps.up, strict=True):
    assert place[t] == levels[-1] and place[s] == place[t] - 1
    levels.append(place[s])
    levels += range(place[s] + 1, place[up] + 1)
  return levels


@pytest.mark.parametrize(
  ("num_steps", "jump", "resamples"),
  [
    (250, 10, 10),
    (20, 5, 3),
    (21, 5, 3),
    (19, 5, 2),
    (10, 1, 4),
    (7, 6, 2),
    (7, 7, 3),
    (5, 10, 10),
    (1, 1, 5),
    (2, 1, 2),
  ],
)
def test_the_order_of_steps_is_the_authors(num_steps, jump, resamples):
  grid = np.arange(num_steps, -1, -1) * 4  # any falling timesteps
  jumps = repaint_jumps(grid, jump, resamples)
  assert walk(grid, jumps) == schedule_jump(num_steps, jump, resamples)
  assert jumps.up[-1] == jumps.s[-1] == 0


def test_a_small_order_by_hand():
  jumps = repaint_jumps(np.array([50, 40, 30, 20, 10, 0]), 2, 2)
  assert [tuple(map(int, row)) for row in zip(*jumps, strict=True)] == [
    *((50, 40, 40), (40, 30, 50)),
    *((50, 40, 40), (40, 30, 30), (30, 20, 20), (20, 10, 30)),
    *((30, 20, 20), (20, 10, 10), (10, 0, 0)),
  ]


@pytest.mark.parametrize(("jump", "resamples"), [(3, 1), (20, 5), (30, 5)])
def test_without_resampling_or_room_for_a_jump_it_is_the_plain_grid(jump, resamples):
  grid = samplers.time_grid(SHORT, 20)
  jumps = repaint_jumps(grid, jump, resamples)
  np.testing.assert_array_equal(jumps.t, grid[:-1])
  np.testing.assert_array_equal(jumps.s, grid[1:])
  np.testing.assert_array_equal(jumps.up, grid[1:])


# Two correlated pixels.

MEAN, STD, RHO = np.array([0.1, -0.2]), 0.4, 0.9
COVARIANCE = STD**2 * np.array([[1, RHO], [RHO, 1]])


def denoise(xt, level):
  """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE)."""
  ab = SHORT.alpha_bar[:, None, None]
  gains = np.sqrt(ab) * COVARIANCE @ np.linalg.inv(ab * COVARIANCE + (1 - ab) * np.eye(2))
  mean = jnp.asarray(MEAN, jnp.float32)[None]
  gain = jnp.asarray(gains, jnp.float32)[level.time + 1]
  return from_x0(mean + (xt - level.alpha * mean) @ gain.T, xt, level)


def inpainted(jump, resamples, *, name="ddpm", known=0.7, number=3000, seed=0):
  """Draws of two pixels, of which the first is known."""
  jumps = repaint_jumps(samplers.time_grid(SHORT, 100), jump, resamples)
  if name == "ddpm":
    table = samplers.ancestral_table(SHORT, jumps.t, jumps.s, "fixed_small")
  else:
    table = samplers.ddim_table(SHORT, jumps.t, jumps.s, 0.0)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(number))
  given, mask = jnp.full((number, 2), known), jnp.asarray([[0.0, 1.0]])

  def run():
    after_row = inpaint_after_row(SHORT, jumps, given, mask, samplers.numbered_noise(keys, (2,)))
    return samplers.sample(table, denoise, keys, (2,), after_row=after_row)[0]

  return np.asarray(jax.jit(run)())


@pytest.fixture(scope="module")
def draws():
  return {"without": inpainted(5, 1), "with": inpainted(5, 10), "ddim": inpainted(5, 10, name="ddim")}


def test_known_pixels_are_those_of_the_image(draws):
  for got in draws.values():
    np.testing.assert_array_equal(got[:, 0], np.float32(0.7))


def test_resampling_brings_the_drawn_pixel_to_its_conditional(draws):
  """RePaint itself is no exact draw: its mean stays 0.05 off here, where without resampling it is 0.18 off."""
  mean, std = MEAN[1] + RHO * (0.7 - MEAN[0]), STD * np.sqrt(1 - RHO**2)
  off = {name: (abs(got[:, 1].mean() - mean), abs(got[:, 1].std() - std)) for name, got in draws.items()}
  assert off["without"][0] > 0.15 and off["without"][1] > 0.025
  assert off["with"][0] < 0.07 and off["with"][1] < 0.012
  assert off["ddim"][0] < 0.075 and off["ddim"][1] < 0.03


def test_every_noise_is_used_once():
  """Numbers 0..N belong to the prior and the rows; each row has two more, and no two rows share one."""
  jumps = repaint_jumps(samplers.time_grid(SHORT, 10), 2, 3)
  rows, asked = len(jumps.t), []

  def noise(number):
    asked.append(int(number))
    return jnp.zeros((1, 2))

  after_row = inpaint_after_row(SHORT, jumps, jnp.zeros((1, 2)), jnp.ones((1, 2)), noise)
  for row in range(rows):
    after_row(jnp.zeros((1, 2)), jnp.asarray(row))
  assert len(asked) == len(set(asked)) == 2 * rows and min(asked) > rows


def test_one_row_by_hand():
  """Known pixels at level s, both pixels diffused up to level `up` by single steps of the forward process."""
  jumps = repaint_jumps(np.array([60, 40, 20, 0]), 1, 2)
  row = next(i for i in range(len(jumps.t)) if jumps.up[i] > jumps.s[i])
  s, up = int(jumps.s[row]), int(jumps.up[row])
  z = {len(jumps.t) + 1 + row: jnp.asarray([[0.3, 0.4]]), 2 * len(jumps.t) + 1 + row: jnp.asarray([[-0.5, 0.6]])}
  mask, known, xs = jnp.asarray([[0.0, 1.0]]), jnp.asarray([[0.7, 0.9]]), jnp.asarray([[0.2, -0.1]])
  got = inpaint_after_row(SHORT, jumps, known, mask, lambda number: z[int(number)])(xs, jnp.asarray(row))
  ab = np.cumprod(np.append(1.0, 1 - np.linspace(1e-3, 0.2, 100)))
  at_s = np.array([np.sqrt(ab[s]) * 0.7 + np.sqrt(1 - ab[s]) * 0.3, -0.1])
  shrink = np.prod([np.sqrt(ab[t] / ab[t - 1]) for t in range(s + 1, up + 1)])
  expected = shrink * at_s + np.sqrt(1 - shrink**2) * np.array([-0.5, 0.6])
  np.testing.assert_allclose(got[0], expected, rtol=1e-5)
