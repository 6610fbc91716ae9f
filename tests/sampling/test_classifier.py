"""Draws that a classifier guides: of a mixture of two kinds of images, with a classifier that knows them exactly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.checkpoint.checkpoint import Checkpoints
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.errors import UserError
from ddpm_jax.runs import sample as sampling
from ddpm_jax.sampling.classes import of_given, wanted
from ddpm_jax.sampling.draw import bind_weights, constants_of, table_of
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights import initial
from ddpm_jax.weights.load import Weights
from ddpm_jax.workdir import layout
from tests.sampling.conftest import Trained, pictures, save_pictures, settings_of
from tests.training.tiny import IMAGE_SHAPE

# Of one kind of images; its negative is that of the other. None of their pixels are clipped.
MEAN, STD = 0.4 * (pictures(1)[0].astype(np.float32) / 127.5 - 1), 0.15
NAMES = ("bright", "dark")


def distances(level, xt):
  """log p(x_t | kind) up to a constant, [B, 2], and E[x_0 | x_t, kind] of each, [2, B, H, W, C]."""
  a, b = (jnp.reshape(value, (-1, 1, 1, 1)) for value in level[:2])
  with jax.numpy_rank_promotion("allow"):
    variance = a**2 * STD**2 + b**2
    away = [xt - a * mean for mean in (MEAN, -MEAN)]
    logs = [-jnp.sum(part**2 / (2 * variance), axis=(1, 2, 3)) for part in away]
    x0 = [mean + a * STD**2 / variance * part for mean, part in zip((MEAN, -MEAN), away, strict=True)]
  return jnp.stack(logs, 1), jnp.stack(x0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """An unconditional model of both kinds alike, with the classifier."""
  config = settings_of(tmp_path_factory.mktemp("classifier"))
  run = build_run(config, IMAGE_SHAPE, make_mesh("pmap"))
  level = lambda time: run.schedule.level(time + 1)  # noqa: E731

  def model(params, xt, time, cond):
    assert cond is None
    logs, x0 = distances(level(time), xt)
    return jnp.einsum("bk,kbhwc->bhwc", jax.nn.softmax(logs), x0) * params["one"]

  def logits(params, xt, time, cond):
    assert cond is None
    return distances(level(time), xt)[0] * params["one"]

  params = {"one": jax.device_put(np.ones((), np.float32), run.mesh.replicated)}
  classifier_config = config_lib.override(config, {"stage": "classifier", "num_classes": 2})
  classifier = run._replace(config=classifier_config, denoiser=Denoiser(logits, PARAMETERIZATIONS["eps"]))
  return Weights(
    run._replace(denoiser=Denoiser(model, PARAMETERIZATIONS["x0"])),
    params,
    5,
    "ema",
    "0" * 64,
    classifier=Weights(classifier, params, 7, "ema", "1" * 64, classes=NAMES),
  )


@pytest.fixture
def drawing(weights, tmp_path, monkeypatch):
  """A workdir from which `sample` draws with these weights."""
  monkeypatch.setattr(sampling, "find_weights", lambda config, path: weights)
  path = tmp_path / "run"
  layout.create(path, weights.run.config)
  own = {"classifier": "runs/classifier", "num_samples": 12, "sampling_steps": 0}
  return Trained(path, config_lib.override(weights.run.config, own))


def kinds(images):
  """To which kind each image is nearer, and the deviation of all from it."""
  x0 = images.reshape(-1, *IMAGE_SHAPE) / 127.5 - 1
  sign = np.where((x0 * MEAN).sum((1, 2, 3)) > 0, 1.0, -1.0)
  return (sign < 0).astype(int), np.std(x0 - sign[:, None, None, None] * MEAN)


@pytest.mark.parametrize(
  "options", [{"sampler": "ddpm"}, {"sampler": "ddim"}, {"sampler": "dpmpp", "eta": 1.0}], ids=str
)
def test_images_are_of_the_classes_asked_for(drawing, options):
  sampling.sample(drawing.having(classes=("dark", "0", "dark"), threshold="none", **options), drawing.path)
  arrays = drawing.load()
  of, deviation = kinds(arrays["images"])
  assert arrays["labels"].tolist() == [1, 0, 1] * 4 == of.tolist()
  assert deviation == pytest.approx(STD, rel=0.1)
  sampling.sample(drawing.having(classes=("dark",), classifier_scale=0.0, **options), drawing.path)
  assert len(set(kinds(drawing.load()["images"])[0])) == 2  # unguided they are of both


@pytest.mark.parametrize("task", ["progressive", "slerp", "interpolate", "inpaint", "reconstruct"])
def test_every_task_is_guided(drawing, task):
  """Ancestral where that is possible. All that is drawn of a given image is dark, even where the image is bright."""
  options = {"sampler": "ddim"} if task == "reconstruct" else {"sampler": "ddpm"}
  few = {"inpaint": {"num_samples": 2, "sampling_steps": 40, "repaint_resamples": 1}}.get(task, {"num_samples": 4})
  given = {} if task in ("progressive", "slerp") else {"input_images": str(drawing.path.parent / "given")}
  if given:
    save_pictures(drawing.path.parent / "given", np.repeat(pictures(1), 8, axis=0))
  if task == "interpolate":
    few["interpolation_timestep"] = 200
  config = drawing.having(classes=("dark",), sample_task=task, classifier_scale=4.0, **options, **few, **given)
  sampling.sample(config, drawing.path)
  images = drawing.load(task)["images"]
  if task == "inpaint":  # the middle alone is drawn
    images = np.where(drawing.load(task)["mask"][None, :, :, None] > 0, images.reshape(-1, *IMAGE_SHAPE), 128)
  if task == "reconstruct":
    drawing.path.joinpath("samples", "reconstruct.npz").unlink()
    sampling.sample(
      dataclasses.replace(config, sample=dataclasses.replace(config.sample, classifier_scale=0.0)), drawing.path
    )
    assert np.abs(images.astype(int) - drawing.load(task)["images"]).max() > 1  # the gradient is a part of the ODE
  else:
    assert set(kinds(images)[0]) == {1}


def test_of_ancestral_sampling_the_mean_moves_and_else_the_estimate(weights):
  xt, label, table = jax.random.normal(jax.random.key(0), (3, *IMAGE_SHAPE)), jnp.asarray([0, 1, 0]), None
  level = weights.run.schedule.level(50)
  plain = weights._replace(classifier=None)
  for sampler, moves in (("ddpm", False), ("ddim", True), ("heun", True)):
    options = config_lib.override(weights.run.config, {"sampler": sampler}).sample
    bind, constants = bind_weights(weights, options), constants_of(weights, options)
    table = table_of(options, weights.run.schedule, "fixed_large")
    unguided = bind_weights(plain, options)(constants_of(plain, options), None)(xt, level).x0
    assert bool((bind(constants, label)(xt, level).x0 != unguided).any()) == moves
    assert (bind.shift(constants, label, table) is None) == moves


# Which classifiers are taken.


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
  """The workdir of a classifier of these images, of one checkpoint."""
  path = tmp_path_factory.mktemp("classifier") / "run"
  config = config_lib.override(weights.run.config, {"stage": "classifier", "num_classes": 2})
  run = build_run(config, IMAGE_SHAPE, make_mesh("pmap"))
  layout.create(path, config)
  checkpoints = Checkpoints(path / "checkpoints", keep=9)
  facts = {"image_shape": list(IMAGE_SHAPE), "config": json.loads(config_lib.to_json(config)), "classes": list(NAMES)}
  checkpoints.save(run.initial_state(), 3, facts)
  checkpoints.wait()
  checkpoints.close()
  return path


def test_a_classifier_is_found_and_guides(folder, weights):
  found = initial.find_classifier(str(folder), weights)
  assert (found.step, found.class_names, found.run.image_shape) == (3, NAMES, IMAGE_SHAPE)
  guided = weights._replace(classifier=found)
  options = config_lib.override(
    weights.run.config, {"sampler": "ddim", "classifier": "c", "classifier_scale": 50.0}
  ).sample
  bind, constants = bind_weights(guided, options), constants_of(guided, options)
  xt = jax.random.normal(jax.random.key(0), (2, *IMAGE_SHAPE))
  both = [
    jax.jit(lambda label: bind(constants, label)(xt, weights.run.schedule.level(100)).x0)(jnp.full(2, y))
    for y in (0, 1)
  ]
  assert float(jnp.abs(both[0] - both[1]).max()) > 1e-3  # another class, another gradient


def test_in_python(folder, original):
  """A scale of 0 is no guidance, and 1,000 far from it; neither compiles anything anew."""
  model, plain = ddpm_jax.load(original.path, classifier=folder), ddpm_jax.load(original.path)
  how = {"steps": 4, "sampler": "ddpm", "batch_size": 8}
  draw = lambda **of: model.sample(3, **how, **of).astype(int)  # noqa: E731
  assert np.abs(draw(classes="dark", classifier_scale=0.0) - plain.sample(3, **how)).max() <= 1
  dark, bright = (draw(classes=name, classifier_scale=1000.0) for name in ("dark", 0))
  assert np.abs(dark - bright).max() > 1 and len(model._draws) == 1


def refusal(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_classifiers_that_do_not_fit_are_refused(folder, weights, original, tmp_path):
  other = lambda **changes: weights._replace(run=weights.run._replace(**changes))  # noqa: E731
  run, config = weights.run, weights.run.config
  conditional = config_lib.override(config, {"conditioning": "class", "num_classes": 2})
  cases = [
    (str(tmp_path), weights, "no run"),
    (str(original.path), weights, "it holds no classifier; name the workdir of one"),
    (str(folder), other(schedule=dataclasses.replace(run.schedule, betas=run.schedule.betas / 2)), "noise schedule"),
    (str(folder), other(first_stage=dataclasses.replace(run.first_stage, image_shape=(8, 8, 3))), "8x8x3"),
    (str(folder), other(config=conditional)._replace(classes=("bright", "blue")), "bright, blue"),
  ]
  told = [refusal(initial.find_classifier, text, of) for text, of, _ in cases]
  wrong = [
    text
    for text, (path, _, part) in zip(told, cases, strict=True)
    if not (path in text and part in text and text.startswith("classifier: "))
  ]
  assert not wrong
  assert initial.find_classifier(str(folder), other(config=conditional)._replace(classes=NAMES)).step == 3


def test_what_a_classifier_cannot_do(folder, weights):
  """It draws nothing, and begins nothing; classes need one; a training run has none."""
  assert "holds a classifier" in refusal(initial.inspect_source, str(folder))
  plain, options = (
    weights._replace(classifier=None),
    config_lib.override(weights.run.config, {"classes": ("dark",)}).sample,
  )
  assert "has no effect, as the model is unconditional" in refusal(wanted, options, plain)
  assert refusal(wanted, dataclasses.replace(options, classifier="runs/c"), plain).startswith("classifier: ")
  assert "'dar'" in refusal(wanted, dataclasses.replace(options, classes=("dar",)), weights)
  assert "name it with --classes" in refusal(of_given, dataclasses.replace(options, classes=()), weights, None)
