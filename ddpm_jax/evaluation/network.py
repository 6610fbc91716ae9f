"""Features of a small U-Net that is trained to remove noise from the images of a data set, without labels."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.config import ModelConfig
from ddpm_jax.data.sources import Source
from ddpm_jax.devices.batched import BatchedFn
from ddpm_jax.devices.mesh import DeviceMesh
from ddpm_jax.diffusion.forward import q_sample
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.evaluation import trained
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.trained import HOLD_OUT, TRAINING, Trained
from ddpm_jax.first_stage.pixels import to_float
from ddpm_jax.keys import indexed_keys, stream_key
from ddpm_jax.models.build import build_model, init_params
from ddpm_jax.models.unet import UNet
from ddpm_jax.workdir.arrays import arrays_sha256

_UNET = ModelConfig(channels=16, channel_multipliers=(1, 2), attention_resolutions=())
_MAPS = "up1_block1", "up0_block1"  # the last of either level: 32 maps and 16
_LARGEST_MAP = 16  # pixels of the U-Net's input, of the side of a square of as many: large images stay cheap
_SCHEDULE = make_schedule("cosine", 1000)
_TIMESTEP = 100  # that of the features
_NUM_STEPS = 300  # of any data set, which twice as many hardly change, see docs/results/evaluation.md
_ASKED = 8  # noises of each image that is held out
# What the features are computed by besides the weights. To be counted up when the U-Net changes.
_NETWORK = "denoising U-Net 1, means up, deviations of the last maps and of the noise, t = 100 of 1000, cosine"
_RECIPE = [_NETWORK, *TRAINING, HOLD_OUT, "adam, cosine"]
MARKS = ("explained",)


class NoiseNetwork(NamedTuple):
  """The network for images of one shape, which predicts eps.

  Attributes:
    model: the U-Net, of images [H / patch, W / patch, patch^2 C], rounded up to what it can halve.
    patch: side of the squares of pixels that are one pixel of the U-Net's.
    shape: [height, width, channels] of what the U-Net takes.
  """

  model: UNet
  patch: int
  shape: tuple[int, int, int]

  @property
  def num_features(self) -> int:
    """D: of the maps of the lower level and twice of the full one, and twice the channels of the images."""
    return 4 * self.model.channels + 2 * self.shape[2] // self.patch**2

  def init(self, key: jax.Array) -> Any:
    """Fresh parameters, a nested dict."""
    return init_params(self.model, key, self.shape)

  def scaled(self, batch: jax.Array) -> jax.Array:
    """uint8 [B, H, W, C] -> float32 [B, *shape] in [-1, 1]."""
    return self.arranged(to_float(batch))

  def arranged(self, x: jax.Array) -> jax.Array:
    """Images float32 [B, H, W, C] -> [B, *shape], whatever is added at the edges their repetition."""
    batch_size, height, width, channels = x.shape
    missing = self.shape[0] * self.patch - height, self.shape[1] * self.patch - width
    edges = [(0, 0), *((size // 2, size - size // 2) for size in missing), (0, 0)]
    x = jnp.pad(x, edges, mode="edge")
    x = x.reshape(batch_size, self.shape[0], self.patch, self.shape[1], self.patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch_size, *self.shape)

  def squared_error(self, params: Any, x0: jax.Array, t: jax.Array, keys: jax.Array) -> jax.Array:
    """Of the noise, whose variance is 1, as the U-Net predicts it: float32 [B], means over each image.

    Args:
      params: of the U-Net.
      x0: float32 [B, *shape].
      t: int32 [B], timesteps.
      keys: of the noise, [B].
    """
    eps = jax.vmap(lambda key: jax.random.normal(key, self.shape))(keys)
    level = _SCHEDULE.level(t)
    output = self.model.apply({"params": params}, jax.vmap(q_sample)(x0, eps, level), level.time)
    return jnp.mean(jnp.square(jnp.asarray(output) - eps), axis=(1, 2, 3))

  def loss(self, params: Any, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """The simple loss of Ho et al. 2020, eq. 14."""
    t_key, eps_key = jax.random.split(key)
    x0 = self.scaled(batch["image"])
    t = jax.random.randint(t_key, (len(x0),), 1, _SCHEDULE.num_timesteps + 1)
    return jnp.mean(self.squared_error(params, x0, t, jax.random.split(eps_key, len(x0))))

  def forward(self, params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(params, uint8 [B, H, W, C]) -> features [B, D], and [B, 0] for the classes that it does not know.

    The U-Net is given the mean of q(x_t | x_0), so that the features are a function of the image alone. The noise that
    it sees there all the same is what the image has more or less of than others, fine structure above all.
    """
    eps, low, full = self._applied(params, self.scaled(batch))
    noise = eps.reshape(len(batch), -1, 1, self.shape[2] // self.patch**2)
    parts = low.mean((1, 2)), full.mean((1, 2)), full.std((1, 2)), noise.mean((1, 2)), noise.std((1, 2))
    return jnp.concatenate(parts, axis=-1), jnp.zeros((len(batch), 0), jnp.float32)

  def maps(self, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images float32 [B, H, W, C] in [-1, 1] -> the last maps of both levels, [B, h, w, D] each."""
    _, low, full = self._applied(params, self.arranged(x))
    return low, full

  def _applied(self, params: Any, x0: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The predicted noise, and the last maps of both levels, of x0 [B, *shape]."""
    level = _SCHEDULE.level(_TIMESTEP)
    eps, state = self.model.apply(
      {"params": params},
      level.alpha * x0,
      jnp.full(len(x0), level.time, jnp.int32),
      capture_intermediates=lambda module, _: module.name in _MAPS,
    )
    low, full = (jnp.asarray(state["intermediates"][name]["__call__"][0]) for name in _MAPS)
    return jnp.asarray(eps), low, full


def network_for(image_shape: tuple[int, int, int]) -> NoiseNetwork:
  """The network for images [H, W, C]."""
  height, width, channels = image_shape
  patch = math.ceil(math.sqrt(height * width) / _LARGEST_MAP)
  unit = 2 ** (len(_UNET.channel_multipliers) - 1)
  rows, columns = (unit * math.ceil(size / (patch * unit)) for size in (height, width))
  shape = rows, columns, patch**2 * channels
  return NoiseNetwork(build_model(_UNET, shape), patch, shape)


def network_features(
  source: Source,
  *,
  cache: pathlib.Path,
  mesh: DeviceMesh,
  batch_size: int,
  seed: int = 0,
  say: Callable[[str], None],
  counted: trained.Counted = trained.uncounted,
  num_steps: int = _NUM_STEPS,
) -> Features:
  """Features of a network that is trained on `source` without labels, or was before.

  A U-Net of 164,000 parameters or a few more learns to predict the noise of noisy images. The features of an image are
  the means of its maps at the end of both levels on the way up, the standard deviations of those of the last, and both
  of the noise that it sees in each channel: 66 numbers for grey images, 70 for images in colour. It depends on the data
  set and on nothing of a run: so checkpoints, and runs on the same data, can be compared, which the features of a run's
  own U-Net would not allow. What was measured to choose it is in docs/results/evaluation.md.

  As with the classifier, a distance between these features is not an FID, and can be compared only where `identity` is
  the same. All processes must call it, and have the same network afterwards.

  Args:
    source: the images of the training split. One in ten is held out.
    cache: folder for the weights, made if need be. They are found again by the fingerprint of the source, the recipe
      and the seed.
    mesh: the devices that extract.
    batch_size: images whose features are computed at once, over all devices.
    seed: of the first weights, of the order of the images, and of the noise.
    say: takes a line about what is done.
    counted: receives the number of training steps done, on every process alike; what it raises ends the training.
    num_steps: training steps of 128 images each.

  Returns:
    'network' with "explained", the share of the variance of the noise that it predicts in the images held out (0 for
    the mean of the noise, 1 if nothing is missing), "trained_on" images, "updates". Its probabilities are [B, 0], as it
    knows no classes of images.

  Raises:
    UserError: an image cannot be read.
  """
  training, held_out = trained.divide(np.arange(len(source)))
  network = network_for(source.image_shape)

  def make() -> Trained:
    say(f"training a network for the features on {len(training)} images without labels, {num_steps} training steps")
    began = time.perf_counter()
    weights = trained.train(
      network.init, source, training, network.loss, num_steps=num_steps, seed=seed, counted=counted
    )
    found = trained.of_first_process(Trained(weights, dict.fromkeys(MARKS, 0.0)))
    found = found._replace(marks=_ask(network, source, held_out, found.weights, mesh, batch_size))
    took = time.perf_counter() - began
    share = f"{100 * found.marks['explained']:.0f}% of the noise"
    say(f"it predicts {share} in {len(held_out)} other images; that took {took:.0f} s")
    return found

  task = json.dumps([source.fingerprint, source.image_shape, _RECIPE, num_steps, seed], sort_keys=True)
  path = cache / f"network-{hashlib.sha256(task.encode()).hexdigest()}.safetensors"
  found = trained.kept_or(path, trained.shapes_of(network.init), MARKS, make, say)
  about: dict[str, str | int | float] = {
    "explained": found.marks["explained"],
    "trained_on": len(training),
    "updates": num_steps,
  }
  extract = trained.extractor(network.forward, (network.num_features, 0), mesh, batch_size)(found.weights)
  return Features("network", arrays_sha256(found.weights, _NETWORK), about, extract, found.weights)


def _ask(
  network: NoiseNetwork,
  source: Source,
  held_out: np.ndarray,
  weights: trained.Weights,
  mesh: DeviceMesh,
  batch_size: int,
) -> dict[str, float]:
  """'explained': the share of the variance of the noise that is predicted in the images `held_out` int [N].

  Each image has `_ASKED` noises, at as many timesteps; all timesteps are spread evenly over 1..T.
  """

  def errors(params: Any, images: jax.Array, index: jax.Array, t: jax.Array) -> jax.Array:
    keys = indexed_keys(jax.random.fold_in(stream_key(0, "classifier"), 3), index)
    return network.squared_error(params, network.scaled(images), t, keys)

  compiled = BatchedFn(errors, mesh, matmul_precision="highest")
  params = jax.device_put(trained.nested(weights), mesh.replicated)
  index = np.arange(_ASKED * len(held_out), dtype=np.int32).reshape(_ASKED, -1)
  t = (1 + _SCHEDULE.num_timesteps * index // max(index.size, 1)).astype(np.int32)
  squared = np.zeros(index.shape)
  for start in range(0, len(held_out), batch_size):
    rows = slice(start, start + batch_size)
    images = source.read(held_out[rows]).images
    for i in range(_ASKED):
      squared[i, rows] = compiled(params, images, index[i, rows], t[i, rows], size=batch_size)
  return {"explained": float(np.float32(1 - squared.mean())) if squared.size else 0.0}
