"""The training step of an autoencoder with its discriminator: one state, one forward pass, any number of devices."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import AutoencoderConfig
from ddpm_jax.diffusion.losses import pointwise_loss
from ddpm_jax.training import autoencoder as ae
from ddpm_jax.training.setup import make_train_step
from tests.training.tiny import host, random_batch, tiny_config, tiny_run

STEPS = 3
TINY = dict(
  stage="autoencoder",
  loss="l1",
  channels=4,
  num_res_blocks=1,
  attention_resolutions=(),
  latent_channels=2,
  warmup_steps=0,
  steps_per_dispatch=1,
  sample_every=0,
)
ADVERSARIAL = TINY | dict(discriminator_weight=0.5, discriminator_layers=1, discriminator_start=1)
VQ = dict(regularizer="vq", codebook_size=8)


def test_kl_of_gaussians_is_their_integral():
  """E_q[log q - log p] on a grid; far beyond the clamp of the log-variance it is finite."""
  z = np.linspace(-60, 60, 240001)
  for mean, log_variance in ((0.0, 0.0), (1.5, -2.0), (-3.0, 3.0)):
    log_q = -((z - mean) ** 2) / (2 * np.exp(log_variance)) - 0.5 * (np.log(2 * np.pi) + log_variance)
    log_p = -(z**2) / 2 - 0.5 * np.log(2 * np.pi)
    integral = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0])
    np.testing.assert_allclose(ae.kl_divergence(jnp.float32(mean), jnp.float32(log_variance)), integral, atol=2e-3)
  assert np.isfinite(ae.kl_divergence(jnp.float32(0), jnp.float32(20)))


def test_the_codebook_loss_weighs_commitment_1_and_codes_a_quarter():
  z, z_q = jnp.asarray([1.0, 3.0]), jnp.asarray([0.0, 1.0])
  by_z, by_code = jax.grad(ae.codebook_loss, (0, 1))(z, z_q)
  np.testing.assert_allclose(by_z, [1, 2])  # 2 (z - z_q) / 2
  np.testing.assert_allclose(by_code, [-0.25, -0.5])
  assert float(ae.codebook_loss(z, z_q)) == 1.25 * 2.5


def test_the_hinge_of_an_undecided_discriminator_is_1_and_of_a_sure_one_0():
  assert float(ae.discriminator_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)))) == 1
  assert float(ae.discriminator_loss(jnp.full(3, 1.5), jnp.full(3, -2.0))) == 0
  assert float(ae.discriminator_loss(jnp.full(3, -1.0), jnp.full(3, 1.0))) == 2


def test_a_value_with_a_gradient():
  f = lambda x: ae.with_gradient(jnp.float32(7), {"a": jnp.asarray([1.0, -2.0])}, x)  # noqa: E731
  value, gradient = jax.value_and_grad(lambda x: 3 * f(x))({"a": jnp.asarray([5.0, 6.0])})
  assert float(value) == 21
  np.testing.assert_array_equal(gradient["a"], [3, -6])


def test_the_adaptive_weight_by_hand():
  """Decoder of one 1x1 convolution x_hat = w z, its loss |x - x_hat| and a discriminator D(x_hat) = v x_hat."""
  rng = np.random.default_rng(0)
  z, x, w, v = rng.normal(size=(64, 3)), rng.normal(size=(64, 2)), rng.normal(size=(3, 2)), rng.normal(size=2)
  a = z.T @ np.sign(z @ w - x) / x.size
  b = -z.T @ np.broadcast_to(v, (64, 2)) / len(x)
  wanted = np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
  gradients = [
    jax.grad(lambda w: jnp.mean(jax.vmap(functools.partial(pointwise_loss, "l1"))(jnp.asarray(z) @ w, jnp.asarray(x)))),
    jax.grad(lambda w: -jnp.mean(jnp.asarray(z) @ w @ jnp.asarray(v))),
  ]
  weight = ae.adaptive_weight(*(gradient(jnp.asarray(w)) for gradient in gradients), 1e4)
  np.testing.assert_allclose(weight, wanted, rtol=1e-5)
  assert float(ae.adaptive_weight(jnp.full(2, 1e-5), jnp.zeros(2), 1e4)) == pytest.approx(2**0.5 / 10)
  assert float(ae.adaptive_weight(jnp.full(2, 9.0), jnp.zeros(2), 1e4)) == 1e4
  # Against the sums over an image of the released code of KL models, whose bound is of the ratio of those.
  assert ae.largest_weight("kl", (4, 5, 3)) == 1e4 / 60 and ae.largest_weight("vq", (4, 5, 3)) == 1e4
  options = AutoencoderConfig(discriminator_weight=0.5)
  objective = ae.AdversarialObjective(None, options, "l1", False, largest=10 * wanted)  # type: ignore
  tree = lambda kernel, other: {  # noqa: E731
    "autoencoder": {"decoder": {"conv_out": {"kernel": kernel}}, "encoder": other},
    "discriminator": jnp.asarray(2.0),
  }
  parts = {"together": tree(jnp.asarray(a), jnp.ones(1)), "adversarial": tree(jnp.asarray(b), jnp.ones(1))}
  gradient, said = objective.combine(parts, {"steps": jnp.asarray(0)})
  np.testing.assert_allclose(said["adversarial_weight"], 0.5 * wanted, rtol=1e-5)
  np.testing.assert_allclose(gradient["autoencoder"]["encoder"], 1 + 0.5 * wanted, rtol=1e-5)
  assert float(gradient["discriminator"]) == 2
  bounded = dataclasses.replace(objective, largest=0.25 * wanted)
  np.testing.assert_allclose(
    bounded.combine(parts, {"steps": jnp.asarray(0)})[1]["adversarial_weight"], 0.125 * wanted, rtol=1e-6
  )
  later = dataclasses.replace(objective, config=dataclasses.replace(options, discriminator_start=9))
  for bad in (np.nan, np.inf):  # of the discriminator: the step is one that is not finite, once it takes part
    parts["adversarial"] = tree(jnp.asarray(b).at[0, 0].set(bad), jnp.ones(1))
    gradient, _ = objective.combine(parts, {"steps": jnp.asarray(0)})
    assert not np.isfinite(gradient["autoencoder"]["decoder"]["conv_out"]["kernel"]).all()
    gradient, _ = later.combine(parts, {"steps": jnp.asarray(0)})
    np.testing.assert_array_equal(gradient["autoencoder"]["decoder"]["conv_out"]["kernel"], jnp.asarray(a))


def trained(run, *, scale=1.0, steps=STEPS):
  """The state after some steps, with discriminator's first weights times `scale`, and all metrics, on one device."""
  state = host(run.initial_state())
  if "discriminator" in state.params:
    state = state.replace(
      params=state.params | {"discriminator": jax.tree.map(lambda w: w * scale, state.params["discriminator"])}
    )
  state = jax.device_put(state, jax.devices()[0])
  step, rows = one_device_step(run), []
  for i in range(steps):
    state, metrics = step(state, jax.device_put(random_batch(seed=i), jax.devices()[0]))
    rows.append(host(metrics))
  return host(state), rows


_steps = {}


def one_device_step(run):
  """`make_train_step`, compiled once for each objective."""
  key = run.config
  if key not in _steps:
    _steps[key] = jax.jit(make_train_step(run))
  return _steps[key]


def test_before_its_start_no_trace_of_the_discriminator_is_in_the_autoencoder():
  """Bit for bit. It learns alone in the step of the warm-up; before that nothing of it is computed."""
  run = tiny_run(tiny_config(**ADVERSARIAL | dict(discriminator_start=2, discriminator_warmup=1)))
  first = host(run.initial_state())
  for steps, same in ((2, True), (3, False)):
    (one, rows), (other, _) = (trained(run, scale=scale, steps=steps) for scale in (1.0, 3.0))
    equal = [
      np.array_equal(*pair)
      for pair in zip(*(jax.tree.leaves(s.params["autoencoder"]) for s in (one, other)), strict=True)
    ]
    assert all(equal) if same else not any(equal)
  assert [row["loss/discriminator"] > 0 for row in rows] == [False, True, True]
  assert [row["loss/adversarial"] != 0 for row in rows] == [False, False, True]
  assert [row["combined/adversarial_weight"] > 0 for row in rows] == [False, False, True]
  after_one, _ = trained(run, steps=1)
  for before, after in zip(*(jax.tree.leaves(s.params["discriminator"]) for s in (first, after_one)), strict=True):
    np.testing.assert_array_equal(before, after)


def test_the_start_counts_the_steps_of_the_learning_rate():
  """Not those that were left out; of these nothing stays, in the discriminator and its optimiser neither."""
  run = tiny_run(tiny_config(**ADVERSARIAL | dict(warmup_steps=2)))
  objective = ae.make_objective(
    run.pair, run.config, run.image_shape, lambda params, x_hat, x: params * jnp.mean((x_hat - x) ** 2)
  )
  step, state = jax.jit(make_train_step(run, objective)), run.initial_state()
  for i, scale in enumerate((np.nan, 1.0, np.inf, 1.0)):
    before = host(state)
    state, metrics = step(state, random_batch(seed=i), frozen={"perceptual": jnp.float32(scale)})
    applied = np.isfinite(scale)
    same = jax.tree.map(np.array_equal, before.replace(step=0, counts=0), host(state).replace(step=0, counts=0))
    assert all(jax.tree.leaves(same)) != applied
    assert int(state.step) == i + 1 and int(state.extra["steps"]) == (i + 1) // 2
    assert float(metrics["learning_rate"]) == pytest.approx(run.config.optimizer.learning_rate * (i // 2) / 2)
    assert not applied or (metrics["combined/adversarial_weight"] > 0) == (i == 3)


@pytest.mark.parametrize(
  ("mode", "changes"),
  [
    ("pmap", dict(grad_accum_steps=2)),
    ("fsdp", dict(grad_accum_steps=2) | VQ),
    ("pmap", dict(steps_per_dispatch=STEPS)),
  ],
  ids=["pmap kl accumulated", "fsdp vq accumulated", "pmap kl several"],
)
def test_eight_devices_and_microbatches_are_one(mode, changes):
  config = tiny_config(parallel=mode, **ADVERSARIAL | changes)
  run = tiny_run(config)
  one = tiny_run(tiny_config(**ADVERSARIAL | {n: v for n, v in changes.items() if n in VQ}))
  wanted, wanted_rows = trained(one)
  several = config.train.steps_per_dispatch
  step = run.mesh.compile(make_train_step(run), run.abstract_state, max_steps=several, packs=run.packs)
  state, rows, batches = run.initial_state(), [], [random_batch(seed=i) for i in range(STEPS)]
  for i in range(0, STEPS, several):
    placed = run.mesh.put_batches(batches[i : i + several], max_steps=several)
    state, metrics, _ = step(state, placed, run.mesh.put_step_command(several))
    rows += [{n: np.atleast_1d(v)[j] for n, v in host(metrics).items()} for j in range(several)]
  names = [n for n in wanted_rows[0] if n.startswith(("loss", "mean", "combined", "grad"))]
  for row, wanted_row in zip(rows, wanted_rows, strict=True):
    for name in names:
      np.testing.assert_allclose(row[name], wanted_row[name], rtol=2e-4, atol=1e-6, err_msg=name)
  assert rows[-1]["combined/adversarial_weight"] > 0
  # Where a gradient is 0 but for rounding, Adam's normalised update is rounding too: compare the rest.
  flat, _ = jax.flatten_util.ravel_pytree(host(state.params))
  assert np.mean(np.abs(flat - jax.flatten_util.ravel_pytree(wanted.params)[0]) > 1e-4) < 0.02
  for name, mine in host(state.extra).items():
    np.testing.assert_allclose(mine, wanted.extra[name], rtol=1e-6)


def test_gradients_of_a_step_are_those_of_its_published_form():
  """Reconstruction, distance, codebook loss, straight-through estimator written out; each network is clipped alone."""
  changes = dict(discriminator_start=0, dropout=0.0, random_flip=False, codebook_size=64)
  run = tiny_run(tiny_config(**ADVERSARIAL | VQ | changes, perceptual="features", perceptual_weight=0.7))

  def distance(scale, x_hat, x):  # [B]
    return scale * jnp.mean((jnp.sin(3 * x_hat) - x) ** 2, axis=(1, 2, 3))

  state, batch = run.initial_state(), jax.tree.map(jnp.asarray, random_batch())
  pair, params = run.pair, state.params
  x, sg = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1, jax.lax.stop_gradient

  def forward(p):
    z = pair.autoencoder.moments(p["autoencoder"], x)
    z_q, codes = pair.autoencoder.quantize(p["autoencoder"], z)
    x_hat = pair.autoencoder.decode(p["autoencoder"], z + sg(z_q - z))
    return x_hat, jnp.mean((sg(z_q) - z) ** 2) + 0.25 * jnp.mean((z_q - sg(z)) ** 2), codes

  def nll(p):
    x_hat, codebook, _ = forward(p)
    return jnp.mean(jnp.abs(x - x_hat)) + 0.7 * jnp.mean(distance(2.0, x_hat, x)) + codebook

  def deceit(p):
    return -jnp.mean(pair.discriminator(params["discriminator"], forward(p)[0]))

  def hinge(p):
    fake = pair.discriminator(p["discriminator"], sg(forward(params)[0]))
    real = pair.discriminator(p["discriminator"], x)
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))

  @jax.jit
  def by_hand(params):
    a, b, d = (jax.grad(term)(params) for term in (nll, deceit, hinge))
    norm = lambda tree: jnp.linalg.norm(tree["autoencoder"]["decoder"]["conv_out"]["kernel"].ravel())  # noqa: E731
    weight = 0.5 * norm(a) / (norm(b) + 1e-4)
    autoencoder = jax.tree.map(lambda a, b: a + weight * b, a["autoencoder"], b["autoencoder"])
    return {"autoencoder": autoencoder, "discriminator": d["discriminator"]}, weight, forward(params)[2]

  wanted, weight, codes = by_hand(params)
  step = jax.jit(make_train_step(run, ae.make_objective(pair, run.config, run.image_shape, distance)))
  new, metrics = step(state, batch, frozen={"perceptual": jnp.float32(2)})
  np.testing.assert_allclose(metrics["combined/adversarial_weight"], weight, rtol=1e-3)
  for part, gradient in host(wanted).items():  # of each the first moment is (1 - b1) times the clipped gradient
    clip = min(1.0, 1.0 / np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient))))
    means = jax.tree.leaves(host(new.opt_state[1][0].mu[part]))
    for mean, leaf in zip(means, jax.tree.leaves(gradient), strict=True):
      np.testing.assert_allclose(mean, 0.1 * clip * leaf, rtol=2e-3, atol=2e-6)
  share = np.bincount(np.asarray(codes).ravel(), minlength=64) / codes.size
  np.testing.assert_allclose(new.extra["use"], 0.99 / 64 + 0.01 * share, rtol=1e-5)
  before, after = (np.asarray(params["autoencoder"]["codebook"]["embedding"]) for params in (params, new.params))
  assert np.array_equal(np.any(before != after, axis=1), share > 0) and np.any(share == 0), "codes that nobody uses"
  assert int(new.extra["steps"]) == 1
