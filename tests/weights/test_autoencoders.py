"""Autoencoders of diffusers against what diffusers computed with them; `tests/interop` asks diffusers itself."""

import json

import jax
import numpy as np
import pytest

from ddpm_jax.errors import UserError
from ddpm_jax.models.build import autoencoder_of_settings, num_params
from ddpm_jax.weights import autoencoders
from ddpm_jax.weights.autoencoders import folded, read_autoencoder, write_autoencoder, write_autoencoder_file
from tests.weights.folders import OLDER, change_json, read_tensors, write_json, write_tensors
from tests.weights.make_autoencoders_golden import AUTOENCODERS, GOLDEN, image_shape
from tests.weights.make_diffusers_golden import network_input, random_tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as archive:
    return dict(archive)


@pytest.fixture
def saved(tmp_path, golden):
  """Makes the folder that diffusers saves of one of them."""

  def make(name: str, older: bool = False, where: str = "model", **changes):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    write_json(folder / "config.json", json.loads(str(golden[f"{name}/config"])) | changes)
    shapes = json.loads(str(golden[f"{name}/shapes"]))
    state = {key: random_tensor(key, tuple(shape)) for key, shape in shapes.items()}
    for today, once in OLDER.items() if older else ():
      state = {key.replace(f".{today}.", f".{once}."): tensor for key, tensor in state.items()}
    write_tensors(folder / WEIGHTS, state)
    return folder

  return make


def refusal(path, *arguments) -> str:
  with pytest.raises(UserError) as caught:
    read_autoencoder(path, *arguments)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)
  return str(caught.value)


def relative(ours, theirs) -> float:
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_it_is_that_of_diffusers(tmp_path, saved, golden, name):
  """Encoder, quantiser and decoder; and every bit of every tensor, every option, is back in what we write."""
  folder, shape = saved(name, older=name == "kl"), image_shape(AUTOENCODERS[name])
  network, params, found, mean, std, notes = read_autoencoder(folder)
  size = network.model.latent_channels
  assert (found, notes) == (shape, ()) or (name == "vq_without_attention" and len(notes) == 1)
  np.testing.assert_array_equal(mean, np.zeros(size))
  np.testing.assert_allclose(std, 1 / AUTOENCODERS[name].get("scaling_factor", 0.18215) * np.ones(size), rtol=1e-6)

  moments = jax.jit(network.moments)(params, network_input(name, shape))
  assert relative(moments, golden[f"{name}/moments"]) < 1e-5
  assert moments.shape[:3] == (2, *network.latent_shape(shape)[:2])
  z = moments[..., :size]
  if network.regularizer == "vq":
    z, indices = jax.jit(network.quantize)(params, z)
    np.testing.assert_array_equal(indices, golden[f"{name}/indices"])
    np.testing.assert_allclose(z, golden[f"{name}/quantized"], atol=1e-6)
    assert len(np.unique(indices)) > 3
  assert relative(jax.jit(network.decode)(params, z), golden[f"{name}/decoded"]) < 1e-5

  (again := tmp_path / "again").mkdir()
  write_autoencoder(again, network, params, np.zeros(size), np.ones(size), shape[:2])
  config, kept = (json.loads((place / "config.json").read_text()) for place in (again, folder))
  written, before = read_tensors(again / WEIGHTS), read_tensors(saved(name, where="today") / WEIGHTS)
  added = written.keys() - before.keys()
  assert added == ({f"{part}quant_conv.{leaf}" for part in ("", "post_") for leaf in ("weight", "bias")}
                   if name == "kl_without" else set())  # fmt: skip
  assert all(written[key].tobytes() == before[key].tobytes() for key in before)
  ours = {"_diffusers_version", "scaling_factor", "use_quant_conv", "use_post_quant_conv", "vq_embed_dim"}
  ours |= {key for key in kept.keys() - config.keys() if kept[key] in (None, True, False)}  # their defaults
  assert {key: kept[key] for key in kept.keys() - ours} == {key: config[key] for key in config.keys() - ours}
  assert config["scaling_factor"] == 1.0 and config.get("vq_embed_dim", size) == size


@pytest.mark.parametrize("name", ["kl_with_attention", "vq"])
def test_the_scale_of_the_latents_folds_into_layers(tmp_path, saved, name):
  """Latents are standardised and decode to the same images; the nearest vectors stay the nearest."""
  network, params, shape, *_ = read_autoencoder(saved(name))
  size, rng = network.model.latent_channels, np.random.default_rng(0)
  mean = rng.normal(size=size).astype(np.float32)
  std = np.exp(rng.normal(size=size)).astype(np.float32) if network.regularizer == "kl" else np.full(size, 2.5)
  (folder := tmp_path / "folded").mkdir()
  write_autoencoder(folder, network, params, mean, std, shape[:2])
  again = read_autoencoder(folder)
  assert (again.network, again.notes) == (network, ())
  np.testing.assert_array_equal(np.stack([again.mean, again.std]), [np.zeros(size), np.ones(size)])
  x = network_input(name, shape)
  moments, standard = (network.moments(p, x) for p in (params, again.params))
  moments, standard = np.asarray(moments), np.asarray(standard)
  expected = (moments[..., :size] - mean) / std
  np.testing.assert_allclose(standard[..., :size], expected, atol=2e-5)
  z, standard_z = moments[..., :size], standard[..., :size]
  if network.regularizer == "kl":
    np.testing.assert_allclose(standard[..., size:], moments[..., size:] - 2 * np.log(std), atol=2e-5)
  else:
    (z, before), (standard_z, after) = network.quantize(params, z), network.quantize(again.params, standard_z)
    np.testing.assert_array_equal(before, after)
  np.testing.assert_allclose(network.decode(again.params, standard_z), network.decode(params, z), atol=5e-5)
  assert num_params(folded(params, mean, std)) == num_params(params)


SCALES = {
  # name, changes (None: left out) -> mean, deviation, words of the note
  "Stable Diffusion's": ("kl", {"scaling_factor": 0.13025}, 0.0, 1 / 0.13025, ""),
  "older than the option": ("kl", {"scaling_factor": None}, 0.0, 1 / 0.18215, "taken for 0.18215"),
  "CompVis/ldm-celebahq-256": ("vq", {"scaling_factor": None}, 0.0, 1.0, "taken for 1.0, that of VQModel until 0.12"),
  "its copies": ("vq", {"scaling_factor": 0.18215}, 0.0, 1 / 0.18215, "write 1.0 there"),
  "Flux": ("kl", {"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 1 / 0.3611, ""),
  "Playground": (
    "kl",
    {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, -3.0], "latents_std": [4.0, 5.0, 6.0]},
    [1.0, 2.0, -3.0],
    [8.0, 10.0, 12.0],
    "",
  ),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_that_a_folder_says(saved, case):
  name, changes, mean, std, note = SCALES[case]
  folder = saved(name)
  options = json.loads((folder / "config.json").read_text()) | changes
  write_json(folder / "config.json", {key: value for key, value in options.items() if changes.get(key, 0) is not None})
  found = read_autoencoder(folder)
  np.testing.assert_allclose(found.mean, np.broadcast_to(mean, 3), rtol=1e-6)
  np.testing.assert_allclose(found.std, np.broadcast_to(std, 3), rtol=1e-6)
  assert (note in " ".join(found.notes)) and len(found.notes) == bool(note)


def test_attention_is_at_a_level_whatever_the_size(saved):
  folder = saved("kl_with_attention")
  assert read_autoencoder(folder).network.model.attention_resolutions == (8,)
  other = read_autoencoder(folder, (32, 48))
  assert other.network.model.attention_resolutions == (16,) and other.image_shape == (32, 48, 1)
  assert "images of 30x32 pixels" in refusal(folder, (30, 32))


# Options, and words of the refusal.
REFUSED = {
  "kl": [
    ({"act_fn": "gelu"}, "act_fn: 'gelu'"),
    ({"tiling": 3}, "tiling: 3 is an option that is not supported"),
    ({"block_out_channels": [8, 12]}, "block_out_channels: [8, 12] are not multiples"),
    ({"norm_num_groups": 3}, "norm_num_groups: 3 does not divide 8"),
    ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types: ['DownEncoderBlock2D'] is no list of 2"),
    ({"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]}, "down_block_types: 'DownBlock2D'"),
    ({"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]}, "up_block_types: attention is not at"),
    ({"out_channels": 1}, "out_channels: 1"),
    ({"sample_size": "big"}, "sample_size: 'big'"),
    ({"sample_size": 9}, "images of 9x9 pixels"),
    ({"scaling_factor": 0}, "scaling_factor: 0 is no number above 0"),
    ({"scaling_factor": None}, "scaling_factor: None"),
    ({"latents_mean": [0.0]}, "latents_mean: [0.0] is no list of 3"),
    ({"latents_std": [1.0, 0.0, 1.0]}, "latents_std"),
    ({"shift_factor": 1.0, "latents_mean": [0.0] * 3}, "shift_factor: 1.0"),
    ({"mid_block_add_attention": "yes"}, "mid_block_add_attention: 'yes'"),
    ({"_class_name": "AutoencoderTiny"}, "_class_name: 'AutoencoderTiny'"),
    ({"latent_channels": 5}, "encoder.conv_out.weight is [6, 16, 3, 3], not [10, 16, 3, 3]"),
    ({"use_quant_conv": False}, "quant_conv"),
  ],
  "vq": [
    ({"norm_type": "spatial"}, "norm_type: 'spatial'"),
    ({"lookup_from_codebook": True}, "lookup_from_codebook: True"),
    ({"vq_embed_dim": 4}, "vq_embed_dim: 4"),
    ({"shift_factor": 0.1}, "shift_factor: 0.1 is an option that is not supported"),
    ({"num_vq_embeddings": 13}, "quantize.embedding.weight is [12, 3], not [13, 3]"),
  ],
}


def test_options_that_we_have_not_are_refused_by_name(saved):
  wrong = []
  for name, cases in REFUSED.items():
    folder = saved(name, where=name)
    config = (folder / "config.json").read_text()
    for changes, words in cases:
      change_json(folder / "config.json", **changes)
      try:
        read_autoencoder(folder)
        wrong.append((changes, "read"))
      except UserError as error:
        message = str(error)
        if words not in message or str(folder) not in message or "\n" in message:
          wrong.append((changes, message))
      (folder / "config.json").write_text(config)
  assert wrong == []


def test_every_tensor_has_a_verdict(saved):
  folder = saved("kl")
  tensors = read_tensors(folder / WEIGHTS)
  tensors["loss.logvar"] = np.zeros(1, np.float32)
  del tensors["post_quant_conv.bias"]
  tensors["decoder.conv_out.bias"] = np.zeros(4, np.float32)
  write_tensors(folder / WEIGHTS, tensors)
  message = refusal(folder)
  for words in ("loss.logvar is too much", "post_quant_conv.bias is missing", "decoder.conv_out.bias is [4], not [3]"):
    assert words in message


def test_where_an_autoencoder_may_be(tmp_path, saved):
  """In a pipeline, in the Hub's cache; what is none says so."""
  direct = read_autoencoder(saved("vq", where="pipeline/vqvae"))
  assert read_autoencoder(tmp_path / "pipeline").network == direct.network
  cache = tmp_path / "hub" / "snapshots" / "0123"
  (blobs := tmp_path / "hub" / "blobs").mkdir(parents=True)
  folder = saved("kl", where="hub/snapshots/0123/vae")
  for name in ("config.json", WEIGHTS):
    (folder / name).rename(blobs / name)
    (folder / name).symlink_to(blobs / name)
  assert read_autoencoder(cache).network == read_autoencoder(folder).network
  (folder / "config.json").unlink()
  (folder / "config.json").symlink_to(tmp_path / "pipeline" / "vqvae" / "config.json")
  assert "leads outside" in refusal(folder)

  (empty := tmp_path / "empty").mkdir()
  assert "holds no autoencoder" in refusal(empty)
  (empty / "autoencoder.safetensors").write_bytes(b"")  # as our export leaves behind
  assert refusal(empty).endswith(f"; name {empty / 'autoencoder.safetensors'}")
  assert "there is no" in refusal(tmp_path / "nothing")
  pickled = saved("kl", where="pickled")
  (pickled / WEIGHTS).rename(pickled / "diffusion_pytorch_model.bin")
  assert "AutoencoderKL.from_pretrained" in refusal(pickled)
  assert "no autoencoder that this version exported" in refusal(tmp_path / "pipeline" / "vqvae" / WEIGHTS)


def test_a_file_of_ours(tmp_path, saved):
  """What it holds comes back; a flipped bit, and settings that are none, do not."""
  weights = read_autoencoder(saved("vq"))._replace(mean=np.float32([0.1, 2, -3]), std=np.float32([0.3] * 3))
  write_autoencoder_file(path := tmp_path / "model.safetensors", weights, {"trained": "here"})
  again = read_autoencoder(path)
  assert again.network == weights.network and again.image_shape == weights.image_shape
  for ours, theirs in zip(*(jax.tree.leaves((w.params, w.mean, w.std)) for w in (again, weights)), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert read_autoencoder(path, (16, 24)).image_shape == (16, 24, 3)
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(data)
  assert "SHA-256" in refusal(path)


SETTINGS = {"out_channels": 3, "channels": 8, "channel_multipliers": [1, 2], "num_res_blocks": 1, "num_groups": 2}
SETTINGS |= {"attention_resolutions": [], "latent_channels": 3, "regularizer": "kl", "codebook_size": 0}
SETTINGS |= {"middle_attention": True}
UNFIT = {"channel_multipliers": [1] * 5}


@pytest.mark.parametrize(
  "changes",
  [
    *({"channels": 0.5}, {"regularizer": "gan"}, {"channel_multipliers": []}, {"attention_resolutions": [0]}),
    *({"middle_attention": 1}, {"unknown": 1}, {"out_channels": 1}, UNFIT),
  ],
)
def test_settings_that_are_none(changes):
  assert autoencoder_of_settings(SETTINGS, (8, 8, 3)).factor == 2
  with pytest.raises(UserError, match="images of" if changes is UNFIT else next(iter(changes))):
    autoencoder_of_settings(SETTINGS | changes, (8, 8, 3))


def test_a_first_multiplier_other_than_one_is_refused():
  network = autoencoder_of_settings(SETTINGS | {"channel_multipliers": [2, 2]}, (8, 8, 3))
  with pytest.raises(UserError, match="channel_multipliers: the first is 2"):
    autoencoders.autoencoder_options(network, (8, 8))
