"""A latent model: its first stage is read once, kept in the workdir, and must stay what it was."""

import dataclasses
import json
import pathlib
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.config import AutoencoderConfig, DiffusionConfig
from ddpm_jax.data.sources import from_array
from ddpm_jax.errors import UserError
from ddpm_jax.export.card import card
from ddpm_jax.first_stage.pixels import to_float
from ddpm_jax.models.build import build_autoencoder
from ddpm_jax.runs import export as export_lib
from ddpm_jax.runs import train as train_lib
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.weights import first_stage, stage_folder
from ddpm_jax.weights.autoencoders import AutoencoderWeights, write_autoencoder, write_autoencoder_file
from ddpm_jax.weights.initial import find_classifier, find_weights
from ddpm_jax.weights.load import load_weights
from ddpm_jax.workdir import layout
from ddpm_jax.workdir.arrays import load_arrays
from tests.command import metrics
from tests.sampling.conftest import pictures
from tests.training.tiny import host, tiny_config

pytestmark = pytest.mark.usefixtures("shared_programs")
SHAPE = (8, 8, 1)
OF_AUTOENCODER = dict(stage="autoencoder", channels=4, attention_resolutions=(), latent_channels=2, num_steps=1)
AUTOENCODER = AutoencoderConfig(latent_channels=2)
LITTLE = dict(channels=4, channel_multipliers=(1, 2), attention_resolutions=(), dropout=0.0, num_steps=4)


def train(workdir, source=None, **changes):
  source = source or from_array(pictures(40, SHAPE), "pictures", np.arange(40) % 3)
  with StopRequest() as stop:
    own = train_lib.Own(source=source)
    train_lib.train(tiny_config(**changes), workdir, train_lib.Invocation(stop, clock=lambda: 0.0, own=own))
  return workdir


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Nothing of an earlier test is in the cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
    yield


@pytest.fixture(scope="module")
def autoencoder(shared_programs, tmp_path_factory):
  return train(tmp_path_factory.mktemp("first") / "stage", **OF_AUTOENCODER)


@pytest.fixture(scope="module")
def whole(shared_programs, autoencoder, home, tmp_path_factory):
  """Four training steps in one go."""
  return train(tmp_path_factory.mktemp("whole") / "run", **LITTLE, first_stage=str(autoencoder))


def weights_of(workdir):
  return load_weights(layout.load_config(workdir), workdir)


def manifest_of(workdir, step):
  return json.loads((workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_text())


def test_a_run_that_was_stopped_is_one_that_was_not_and_needs_its_workdir_alone(whole, autoencoder, tmp_path):
  """To the bit; and to rounding where the images are encoded in each step. The autoencoder's workdir is gone then."""
  elsewhere = shutil.copytree(autoencoder, tmp_path / "stage")
  run, encoding = tmp_path / "run", tmp_path / "encoding"
  options = LITTLE | {"first_stage": str(elsewhere)}
  train(run, **options | {"num_steps": 2})
  train(encoding, **options | {"num_steps": 2}, cache_gib=0.0)
  shutil.rmtree(elsewhere)
  train(run, **options)
  train(encoding, **options, cache_gib=0.0)
  ours, theirs, encoded = weights_of(run), weights_of(whole), weights_of(encoding)
  assert ours.identity == theirs.identity
  chex.assert_trees_all_equal(host(ours.run.frozen), host(theirs.run.frozen))
  chex.assert_trees_all_close(host(encoded.params), host(theirs.params), rtol=1e-4, atol=1e-5)
  shapes = jax.tree.map(np.shape, host(ours.params))
  assert shapes["conv_in"]["kernel"] == (3, 3, 2, 4)
  facts, settings = manifest_of(run, 4)["first_stage"], json.loads((run / "first_stage" / "settings.json").read_text())
  assert facts == {name: settings[name] for name in ("sha256", "mean", "std")} == ours.run.first_stage_facts
  arrays, _ = load_arrays(run / "first_stage" / "weights.safetensors")
  kept = load_weights(layout.load_config(autoencoder), autoencoder).params["autoencoder"]
  np.testing.assert_array_equal(arrays["autoencoder.decoder.conv_out.kernel"], kept["decoder"]["conv_out"]["kernel"])


def test_stages_of_bfloat16_learn_what_those_of_float32_do_and_images_are_encoded_in_float32(
  whole, autoencoder, tmp_path
):
  """Whatever the type of either run; and the losses are those of float32 to the rounding of bfloat16, but not those."""
  stage = train(tmp_path / "stage", **OF_AUTOENCODER, dtype="bfloat16")
  run = train(tmp_path / "run", **LITTLE, dtype="bfloat16", first_stage=str(stage))
  for narrow, wide in ((stage, autoencoder), (run, whole)):
    ours, theirs = (np.asarray([row["loss"] for row in metrics(workdir)]) for workdir in (narrow, wide))
    np.testing.assert_allclose(ours, theirs, rtol=0.05)
    assert np.any(ours != theirs)  # the first ones are those of outputs that are 0
    assert {leaf.dtype for leaf in jax.tree.leaves(host(weights_of(narrow).params))} == {np.dtype(np.float32)}
  of_run = weights_of(run).run
  params, images = host(of_run.frozen), pictures(3, SHAPE)
  of_stage = weights_of(stage)
  assert of_stage.run.config.model.dtype == of_run.config.model.dtype == "bfloat16"
  both = lambda params, images: of_run.first_stage.decode(  # noqa: E731
    params, of_run.first_stage.x0(params, of_run.first_stage.moments(params, images))
  )
  assert "bf16" not in str(jax.make_jaxpr(both)(params, images))
  xt, time = np.zeros((3, 4, 4, 2), np.float32), np.zeros(3, np.float32)
  network = of_run.denoiser.network
  assert "bf16" in str(jax.make_jaxpr(lambda params: network(params, xt, time))(host(weights_of(run).params)))


def test_images_become_latents_and_latents_images(whole):
  model = ddpm_jax.load(whole)
  images = pictures(40, SHAPE)
  latents = model.encode(images)
  assert (model.image_shape, model.latent_shape, latents.shape) == (SHAPE, (4, 4, 2), (40, 4, 4, 2))
  # Of both orientations, which the statistics are of, with the posterior's own variance: so within, not at, 0 and 1.
  both = np.concatenate([latents, model.encode(images[:, :, ::-1])])
  assert np.abs(both.mean((0, 1, 2))).max() < 0.01 and both.std((0, 1, 2)).max() < 1.01
  assert model.decode(latents).shape == (40, *SHAPE) and model.decode(latents).dtype == np.uint8
  assert model.sample(2, sampler="dpmpp", steps=2).shape == (2, *SHAPE)
  assert model.denoise(latents, 3).shape == latents.shape
  for call, words in (
    (lambda: model.encode(latents), "images: float32 .*; make images of latents first: model.decode\\(x0\\)"),
    (lambda: model.encode(latents[:, 1:]), "images: float32 .*; make it so"),
    (lambda: model.decode(images), "x0: .*; encode images first: model.encode\\(images\\)"),
    (lambda: model.denoise(images, 3), "x: .*; encode images first: model.encode\\(images\\)"),
    (lambda: model.eps(to_float(images), 3), "x: .*; encode images first: model.encode\\(images\\)"),
    (lambda: model.denoise(latents[0], 3), "x: .*; make it so"),
  ):
    with pytest.raises(UserError, match=f"^{words}$"):
      call()


def test_a_first_stage_alone_encodes_and_decodes(autoencoder, whole):
  """As a latent model does that was trained on it, but for the statistics of a data set; and it draws nothing."""
  model, latent = ddpm_jax.load(autoencoder), ddpm_jax.load(str(whole))
  images = pictures(5, SHAPE)
  latents = model.encode(images)
  assert (model.image_shape, model.latent_shape, latents.shape) == (SHAPE, (4, 4, 2), (5, 4, 4, 2))
  facts = manifest_of(whole, 4)["first_stage"]
  standardised = (latents - np.asarray(facts["mean"])) / np.asarray(facts["std"])
  np.testing.assert_allclose(standardised, latent.encode(images), rtol=1e-4, atol=1e-4)
  back = model.decode(latents)
  assert back.dtype == np.uint8 and back.shape == images.shape
  assert np.abs(back.astype(int) - latent.decode(latent.encode(images))).max() <= 1
  trained = weights_of(autoencoder).params["autoencoder"]
  chex.assert_trees_all_equal(host(model.params), host(trained))
  assert repr(model).startswith("<Autoencoder of 8x8x1 images, ") and repr(model).endswith(" weights after step 1>")
  raw = ddpm_jax.load(autoencoder, weights="raw", checkpoint=1)
  assert (raw.weights.which, raw.weights.step, raw.latent_shape) == ("raw", 1, (4, 4, 2))
  nothing = "an autoencoder draws and denoises nothing, it has encode and decode; train a latent model on it, .*"
  no_effect = f"{autoencoder} holds an autoencoder, on which it has no effect; leave it out"
  for call, words in (
    (lambda: model.sample(2), nothing),
    (lambda: model.denoise(latents, 3), nothing),
    (lambda: model.eps(latents, 3), nothing),
    (lambda: latent.sample(2, guidance_scale=2, guide_with=model), f"guide_with: {nothing}"),
    (lambda: model.decode(images), "x0: .*; encode images first: .*"),
    (lambda: ddpm_jax.load(autoencoder, dtype="bfloat16"), f"dtype: {no_effect}"),
    (lambda: ddpm_jax.load(autoencoder, classifier="runs/c"), f"classifier: {no_effect}"),
    (lambda: ddpm_jax.load(autoencoder, checkpoint=7), "checkpoint: .* has no 7, only 1.*"),
  ):
    with pytest.raises(UserError, match=f"^{words}$"):
      call()


def test_both_stages_are_trained_from_python(tmp_path, monkeypatch, capsys):
  """Each returns what was trained; a relative path is kept as the command keeps it."""
  monkeypatch.chdir(tmp_path)
  images = pictures(40, SHAPE)
  stage = ddpm_jax.train(tiny_config(**OF_AUTOENCODER), "stage", source=images)
  assert repr(stage).startswith("<Autoencoder of 8x8x1 images, ")
  model = ddpm_jax.train(tiny_config(**LITTLE | {"num_steps": 1}, first_stage="stage"), "latent", source=images)
  assert model.config.diffusion.first_stage == str(tmp_path / "stage")
  chex.assert_trees_all_equal(host(model.weights.run.frozen["autoencoder"]), host(stage.params))
  assert model.sample(2, sampler="dpmpp", steps=2).shape == (2, *SHAPE)
  assert "mean/kl" in metrics(tmp_path / "stage")[0] and "--mode=evaluate" not in capsys.readouterr().out
  begun = tiny_config(**LITTLE | {"num_steps": 1}, first_stage="latent", init_from="latent")
  assert ddpm_jax.train(begun, "begun", source=images).config.exchange.init_from == str(tmp_path / "latent")
  shutil.rmtree("stage")
  ddpm_jax.train(tiny_config(**OF_AUTOENCODER, seed=1), "stage", source=images)
  with pytest.raises(UserError, match=r"^first_stage: \S+ holds another first stage, .*; leave --first_stage out"):
    ddpm_jax.train(tiny_config(**LITTLE | {"num_steps": 1}, first_stage="stage"), "latent", source=images)
  again = ddpm_jax.train(tiny_config(**LITTLE | {"num_steps": 1}), "latent", source=images)
  assert again.weights.identity == model.weights.identity


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_an_exported_first_stage_alone_encodes_and_decodes(regularizer, tmp_path):
  """From a folder of diffusers and from a file, with the scale that they hold; of any width."""
  of = dict(stage="autoencoder", channels=3, norm_groups=3, channel_multipliers=(1, 2), attention_resolutions=())
  config = tiny_config(**of, regularizer=regularizer, latent_channels=2)
  network = build_autoencoder(config.model, config.autoencoder, SHAPE)
  params = host(network.init(jax.random.key(0), SHAPE))
  mean, std = np.asarray([0.5, -1], np.float32), np.full(2, 0.25, np.float32)
  (tmp_path / "vae" / "vae").mkdir(parents=True)  # in it there may be anything
  write_autoencoder(tmp_path / "vae", network, params, mean, std, SHAPE[:2])
  write_autoencoder_file(
    tmp_path / "autoencoder.safetensors",
    AutoencoderWeights(stage_folder.as_used(network), params, SHAPE, mean, std),
    {},
  )
  images, bad = pictures(3, SHAPE), {"dtype": "bfloat16", "classifier": "runs/c", "weights": "raw", "checkpoint": 7}
  z = np.asarray(network.moments(params, to_float(images)))[..., :2]
  for place in ("vae", "autoencoder.safetensors"):
    model = ddpm_jax.load(tmp_path / place)
    assert (model.image_shape, model.latent_shape, model.config.autoencoder.regularizer) == (
      SHAPE,
      (4, 4, 2),
      regularizer,
    )
    latents = model.encode(images)
    np.testing.assert_allclose(latents, (z - mean) / std, rtol=1e-4, atol=1e-4)
    assert model.decode(latents).shape == images.shape
    assert repr(model).startswith("<Autoencoder of 8x8x1 images, ")
    with pytest.raises(UserError, match="an autoencoder draws and denoises nothing"):
      model.sample(2)
    for name, value in bad.items():
      with pytest.raises(UserError, match=f"^{name}: .*; leave it out$"):
        ddpm_jax.load(tmp_path / place, **{name: value})
  with pytest.raises(UserError, match=r"holds autoencoder.safetensors; name that file$"):
    ddpm_jax.load(tmp_path)
  with pytest.raises(UserError, match=r"cannot be looked at"):
    ddpm_jax.load("x" * 5000)


def test_a_first_stage_is_of_float32_whatever_it_was_trained_in():
  """To the bit the network of float32, without dropout."""
  of = dict(stage="autoencoder", channels=4, channel_multipliers=(1, 2), attention_resolutions=())
  built = []
  for changes in ({}, dict(dtype="bfloat16", dropout=0.5, remat="blocks")):
    config = tiny_config(**of | dict(dropout=0.0) | changes)
    built.append(build_autoencoder(config.model, config.autoencoder, SHAPE))
  plain, trained = built
  params = plain.init(jax.random.key(0), SHAPE)
  stage = stage_folder.Autoencoder(trained, params).fixed(SHAPE)
  images = jnp.asarray(pictures(2, SHAPE))
  moments = stage.latents.moments(stage.params, images)
  np.testing.assert_array_equal(moments, plain.moments(params, to_float(images)))
  assert np.abs(moments - trained.moments(params, to_float(images))).max() > 1e-4


def test_other_first_stages_are_refused(whole, autoencoder, tmp_path):
  """A line that names the field, and nothing written."""
  pixels = train(tmp_path / "pixels", **LITTLE | {"num_steps": 1})
  other = train(tmp_path / "other", **OF_AUTOENCODER, seed=1)
  bare = tmp_path / "bare"
  bare.mkdir()
  text = tmp_path / "text.safetensors"
  text.write_text("none")
  large, colour = (from_array(pictures(20, shape), "others") for shape in ((16, 8, 1), (8, 8, 3)))
  of = LITTLE | {"first_stage": str(autoencoder)}
  cases = [
    (of | {"first_stage": str(tmp_path / "nothing")}, None, "there is nothing"),
    (of | {"first_stage": str(bare)}, None, f"first_stage: {bare} holds no autoencoder: "),
    (of | {"first_stage": str(text)}, None, f"first_stage: {text} is no whole safetensors file"),
    (of | {"first_stage": str(pixels)}, None, "holds a model of pixels"),
    (of, large, "of images of 8x8x1, those of others are 16x8x1"),
    (of, colour, "of images of 8x8x1, those of others are 8x8x3"),
    (of | {"channel_multipliers": (1, 1, 1, 1)}, None, "is not divisible by 16, as the first stage"),
  ]
  for options, source, words in cases:
    with pytest.raises(UserError) as caught:
      train(tmp_path / "run", source, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value), (words, caught.value)
    assert not (tmp_path / "run").exists(), words
  run = shutil.copytree(whole, tmp_path / "latent")
  kept = stage_folder.read_kept(run)
  before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}

  def refused(words, **changes):
    with pytest.raises(UserError) as caught:
      train(run, **of | {"num_steps": 5} | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value), (words, caught.value)

  refused("than the run in", first_stage=str(other))
  refused("first_stage: ", first_stage="")
  assert before == {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
  with pytest.raises(UserError, match=r"^first_stage: "):
    train(pixels, **of)
  stage_folder.keep(run, kept._replace(std=2 * kept.std).fixed(SHAPE), {})
  refused("latents of another mean and deviation")
  changed = jax.tree.map(lambda leaf: leaf + np.float32(1), kept.params)
  stage_folder.keep(run, kept._replace(params=changed).fixed(SHAPE), {})
  refused("another first stage")
  with pytest.raises(UserError, match="another first stage"):
    weights_of(run)
  settings = run / "first_stage" / "settings.json"
  settings.write_text(settings.read_text().replace('"kl"', '"vq"'))
  refused("weights.safetensors does not go with settings.json")
  settings.write_text("none")
  refused("settings.json cannot be read")
  stage_folder.keep(run, kept.fixed(SHAPE), {})
  weights = run / "first_stage" / "weights.safetensors"
  weights.write_bytes(weights.read_bytes()[:-9])
  refused("weights.safetensors is no whole safetensors file")
  shutil.rmtree(run / "first_stage")
  refused("is missing")


def test_a_first_stage_that_one_host_has_no_longer_is_read_by_none(whole, monkeypatch):
  """Reading is done together: who alone began would wait for ever."""
  asked = []
  monkeypatch.setattr(first_stage, "any_host", lambda lacks: asked.append(lacks) or True)
  monkeypatch.setattr(first_stage, "read_named", lambda *_: pytest.fail("read by this host alone"))
  found = first_stage.find(layout.load_config(whole), whole, given=True)
  assert found and found.sha256 == stage_folder.read_kept(whole).sha256 and asked == [False]


def test_weights_go_on_with_their_first_stage_alone(whole, autoencoder, tmp_path):
  """From a workdir, a file or a folder of diffusers: theirs with its statistics, on other images too; no other one."""
  other = train(tmp_path / "other", **OF_AUTOENCODER, seed=1)
  pixels = train(tmp_path / "pixels", **LITTLE | {"num_steps": 1})
  config = layout.load_config(whole)
  for form in ("diffusers", "safetensors"):
    how = {"export_format": form, "export_dir": str(tmp_path / form)}
    export_lib.export(config_lib.override(config, how), whole)
  folder, file = str(tmp_path / "diffusers"), str(tmp_path / "safetensors" / "model.safetensors")
  few, ours = from_array(pictures(20, SHAPE), "few"), stage_folder.read_kept(whole)
  for i, (path, stage) in enumerate(
    [(str(whole), str(whole)), (str(whole), str(autoencoder)), (file, file), (file, str(autoencoder))]
  ):
    begun = train(tmp_path / f"begun{i}", few, **LITTLE | {"num_steps": 1}, init_from=path, first_stage=stage)
    kept = stage_folder.read_kept(begun)
    assert kept.sha256 == ours.sha256
    np.testing.assert_array_equal([kept.mean, kept.std], [ours.mean, ours.std])
    # A workdir is its own, wherever its first weights came from.
    assert weights_of(train(begun, few, **LITTLE, init_from=path, first_stage=stage)).step == 4
  found = find_weights(config_lib.override(config, {"init_from": folder, "first_stage": folder}), None)
  np.testing.assert_allclose(found.run.first_stage_facts["std"], 1.0)  # folded into its layers
  for path in (str(whole), file, folder):
    for stage, words in ((str(other), "another first stage, "), ("", "are of latents; use --first_stage=")):
      options = LITTLE | {"init_from": path, "first_stage": stage}
      for call in (
        lambda options=options: train(tmp_path / "run", **options),
        lambda options=options: find_weights(tiny_config(**options), None),
      ):
        with pytest.raises(UserError, match=r"^first_stage: ") as caught:
          call()
        assert words in str(caught.value) and "\n" not in str(caught.value), (path, stage, caught.value)
  with pytest.raises(UserError, match=r"^first_stage: the weights of \S+ are of pixels, not of the latents of "):
    train(tmp_path / "run", **LITTLE, init_from=str(pixels), first_stage=str(autoencoder))
  assert not (tmp_path / "run").exists()


def test_what_takes_long_comes_after_what_is_trained(autoencoder, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  train(tmp_path / "run", **LITTLE | {"num_steps": 1}, first_stage=str(autoencoder))
  said = capsys.readouterr().out
  places = [said.index(words) for words in ("U-Net of ", "data: ", "encoding the 40 images", "a new run: ")]
  assert places == sorted(places) and said.count("U-Net of ") == 1
  train(tmp_path / "run", **LITTLE | {"num_steps": 2}, first_stage=str(autoencoder))
  said = capsys.readouterr().out
  assert said.index("U-Net of ") < said.index("resuming ") and "encoding" not in said


def test_the_first_lines_tell_latents_and_first_stage(whole, autoencoder, tmp_path, monkeypatch, capsys):
  """Where the first stage is taken from, before the workdir keeps it; whether images are encoded, or the cache is."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
  one, kept = LITTLE | {"num_steps": 1}, lambda name: f"(kept in {tmp_path / name / 'first_stage'})"
  for name, path, more in (("a", autoencoder, ""), ("b", whole, ", where it is the first stage of a latent model")):
    train(tmp_path / name, **one, first_stage=str(path))
    said = capsys.readouterr().out.splitlines()
    where = said.index(f"latents: 4x4x2 of a KL autoencoder, taken from {path}{more} {kept(name)}")
    assert "U-Net of " in said[where - 1]
    cached = [line for line in said if line.startswith("latents taken from ")]
    assert len(cached) == (name == "b") and ("encoding" in "".join(said)) == (name == "a")
    assert all(pathlib.Path(line.removeprefix("latents taken from ")).is_file() for line in cached)
  train(tmp_path / "a", **LITTLE | {"num_steps": 2}, first_stage=str(autoencoder))
  said = capsys.readouterr().out.splitlines()
  assert f"latents: 4x4x2 of a KL autoencoder {kept('a')}" in said
  train(tmp_path / "pixels", **one)
  assert "latents" not in capsys.readouterr().out


def test_the_cards_tell_the_first_stage_and_no_options_without_effect(whole, autoencoder, tmp_path):
  texts = []
  for workdir in (whole, autoencoder):
    target = tmp_path / workdir.name
    export_lib.export(config_lib.override(layout.load_config(workdir), {"export_dir": str(target)}), workdir)
    texts.append((target / "README.md").read_text())
  of_model, of_stage = ({*re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)} for text in texts)
  digest = stage_folder.read_kept(whole).sha256
  for part in ("- kind: KL autoencoder\n", "- latents: 4x4x2\n", f"`{digest[:12]}`...\n"):
    assert part in texts[0] and part not in texts[1], part
  assert re.search(r"draws latents of 4x4x2, and a KL autoencoder, of [\d,]+ parameters, decodes them", texts[0])
  of_autoencoders = {field.name for field in dataclasses.fields(AutoencoderConfig)}
  assert not of_model & of_autoencoders and {"num_timesteps", "prediction", "channels"} <= of_model
  assert of_stage & of_autoencoders == {
    *("regularizer", "latent_channels", "kl_weight", "perceptual", "discriminator_weight"),
  }
  of_diffusion = {field.name for field in dataclasses.fields(DiffusionConfig)}
  assert of_stage & of_diffusion == {"loss"}


def test_the_card_says_by_which_classes_a_model_draws(whole):
  weights = weights_of(whole)
  told = {"conditioning": "class", "num_classes": 3, "label_dropout": 0.25}
  run = weights.run._replace(config=config_lib.override(weights.run.config, told))
  text = card(run.config, weights._replace(run=run), None, "")
  assert "that draws images of 8x8x1 by class (3 classes, label dropout 0.25): a U-Net" in text.replace("\n", " ")


def test_a_classifier_of_other_latents_does_not_guide(whole, autoencoder, tmp_path):
  options = dict(stage="classifier", num_classes=3, channels=4, channel_multipliers=(1,), attention_resolutions=())
  same = train(tmp_path / "same", **options, num_steps=1, first_stage=str(autoencoder))
  pixels = train(tmp_path / "pixels", **options, num_steps=1)
  weights = weights_of(whole)
  assert find_classifier(str(same), weights).run.first_stage_facts == weights.run.first_stage_facts
  with pytest.raises(UserError, match="its first stage is not that of the model"):
    find_classifier(str(pixels), weights)


def test_thresholds_of_pixels_are_none_of_latents(whole):
  config = layout.load_config(whole)
  for threshold in ("static", "dynamic"):
    with pytest.raises(UserError, match=f"^threshold: {threshold} "):
      config_lib.override(config, {"threshold": threshold})
