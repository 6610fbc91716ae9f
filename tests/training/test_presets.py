"""Every preset builds; the paper's CIFAR-10 step traces in both precisions with a float32 state."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags
from ddpm_jax.config import Config
from ddpm_jax.devices import make_mesh
from ddpm_jax.models.build import build_autoencoder, build_discriminator, build_model, init_params, num_params
from ddpm_jax.training.setup import build_run, make_train_step
from tests.training.tiny import random_batch, tiny_config, tiny_run

CLASSES = {"fashion_mnist_cond": 10, "emoji32_cond": 9, "cifar10_cond": 10, "imagenet64": 1000}  # of the images
EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
PAPER_32, PAPER_256 = 35_746_307, 113_673_219
PRESETS = {  # what the data set delivers, and the size of the network
  "digits": ((8, 8, 1), 701_345),
  "fashion_mnist": ((28, 28, 1), 1_112_801),
  "images32": ((32, 32, 3), 2_688_179),
  "images64": ((64, 64, 3), PAPER_32),
  "emoji32": ((32, 32, 3), 2_688_179),
  "emoji64": ((64, 64, 3), 4_256_563),
  "fashion_mnist_cond": ((28, 28, 1), 1_112_801 + 11 * 128),  # a row for each class, and for none
  "emoji32_cond": ((32, 32, 3), 2_688_179 + 10 * 64),
  "cifar10_cond": ((32, 32, 3), PAPER_32 + 11 * 512),
  "cifar10": ((32, 32, 3), PAPER_32),
  "imagenet64": ((64, 64, 3), 295_904_454 - 3 * (9 * 192 + 1)),  # without the second half of the output
  "celebahq256": ((256, 256, 3), PAPER_256),
  "lsun_bedroom": ((256, 256, 3), PAPER_256),
  "lsun_church": ((256, 256, 3), PAPER_256),
  "lsun_cat": ((256, 256, 3), PAPER_256),
}
FIRST_STAGES = {  # and the shape of their latents
  "emoji64_ae": ((64, 64, 3), 681_911, (16, 16, 4)),
  "ldm_kl_f8": ((256, 256, 3), 83_653_863, (32, 32, 4)),
  "ldm_vq_f4": ((256, 256, 3), 55_322_782, (64, 64, 3)),
}
SECOND_STAGES = {  # what the first one delivers, the number of classes, and the size of the network
  "emoji64_ldm": ((16, 16, 4), 9, 7_405_316),
  "ldm_celebahq256": ((64, 64, 3), 0, 274_056_163),
  "ldm_church256": ((32, 32, 4), 0, 294_966_916),
  "ldm_imagenet256": ((64, 64, 3), 1000, 263_905_347),  # not the published one, see its header
}
DISCRIMINATOR = 2_765_633  # of three strided convolutions


def read(name, *overrides):
  registry = absl_flags.FlagValues()
  flags.define(registry)
  registry(["main", f"--flagfile={EXPERIMENTS / name}.flags", *overrides])
  return config_lib.override(Config(), flags.given(registry))


def test_all_presets_are_here():
  assert {path.stem for path in EXPERIMENTS.glob("*.flags")} == {*PRESETS, *FIRST_STAGES, *SECOND_STAGES}


@pytest.mark.parametrize("name", PRESETS)
def test_builds(name):
  image_shape, size = PRESETS[name]
  config = config_lib.override(read(name), {"num_classes": CLASSES[name]} if name in CLASSES else {})
  run = build_run(config, image_shape, make_mesh("pmap"))
  assert num_params(run.abstract_state.params) == size
  run.mesh.check_batch(run.config.data.batch_size)  # eight devices share it


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_builds_a_first_stage(name):
  image_shape, size, latent_shape = FIRST_STAGES[name]
  config = read(name)
  network = build_autoencoder(config.model, config.autoencoder, image_shape)
  assert num_params(jax.eval_shape(lambda: network.init(jax.random.key(0), image_shape))) == size
  assert network.latent_shape(image_shape) == latent_shape
  if config.autoencoder.discriminator_weight:
    discriminator = build_discriminator(config.autoencoder.discriminator_layers, image_shape)
    assert num_params(jax.eval_shape(lambda: discriminator.init(jax.random.key(0)))) == DISCRIMINATOR
  assert config.data.batch_size % 8 == 0


@pytest.mark.parametrize("name", SECOND_STAGES)
def test_builds_a_second_stage(name):
  latent_shape, classes, size = SECOND_STAGES[name]
  first_stage = read(name).diffusion.first_stage.removeprefix("runs/")
  assert latent_shape == FIRST_STAGES[first_stage][2]
  config = config_lib.override(read(name), {"num_classes": classes})
  network = build_model(config.model, latent_shape)
  assert num_params(jax.eval_shape(lambda: init_params(network, jax.random.key(0), latent_shape))) == size
  assert config.data.batch_size % 8 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cifar10_step(dtype):
  run = build_run(read("cifar10", f"--dtype={dtype}"), (32, 32, 3), make_mesh("pmap"))
  batch = {
    "image": jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.uint8),
    "index": jax.ShapeDtypeStruct((128,), jnp.int32),
    "replaced": jax.ShapeDtypeStruct((128,), jnp.bool_),
  }
  state, metrics = jax.eval_shape(functools.partial(make_train_step(run)), run.abstract_state, batch)
  same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, run.abstract_state)
  assert all(jax.tree.leaves(same))
  assert {leaf.dtype for leaf in jax.tree.leaves((state, metrics))} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(("dtype", "others"), [("float32", 0), ("bfloat16", 3)])
def test_convolutions_run_in_the_type_that_was_asked_for(dtype, others):
  """All but the last one (forward, and its two gradients), which is in float32 always. On a CPU some are products."""
  run = tiny_run(tiny_config(dtype=dtype))
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch())
  lowered = jax.jit(make_train_step(run)).trace(run.abstract_state, batch).lower(lowering_platforms=("tpu",))
  text = lowered.as_text()
  types = re.findall(r"stablehlo\.convolution.*-> tensor<[^>]*x(\w+)>", text)
  assert len(types) > 30
  assert sum(found != {"float32": "f32", "bfloat16": "bf16"}[dtype] for found in types) == others
