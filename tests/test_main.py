import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jaxlib
import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

import ddpm_jax.runs
from ddpm_jax import config as config_lib
from ddpm_jax import flags, main, presets, resolve
from ddpm_jax.config import Config
from ddpm_jax.data.images import BadRecord
from ddpm_jax.errors import NonFiniteError, RunError, UserError
from ddpm_jax.runs.train import Invocation
from ddpm_jax.runtime import distributed
from ddpm_jax.runtime.stop import StopRequest
from ddpm_jax.workdir import layout

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture
def runs(monkeypatch) -> types.SimpleNamespace:
  """Takes the place of the runs: what they were called with, and what they raise."""
  record = types.SimpleNamespace(calls=[], said=[], error=None)

  def run(mode):
    def called(config, folder, *others):
      record.calls.append((mode, config, folder))
      record.said.append(others[0].note if mode == "train" else "")
      record.more = others
      if record.error:
        raise record.error

    return called

  training = types.SimpleNamespace(train=run("train"), Invocation=Invocation)
  monkeypatch.setattr(ddpm_jax.runs, "train", training, raising=False)
  monkeypatch.setattr(ddpm_jax.runs, "sample", types.SimpleNamespace(sample=run("sample")), raising=False)
  measured = types.SimpleNamespace(evaluate=run("evaluate"))
  monkeypatch.setattr(ddpm_jax.runs, "evaluate", measured, raising=False)
  planned = types.SimpleNamespace(plan=run("plan"))
  monkeypatch.setattr(ddpm_jax.runs, "plan", planned, raising=False)
  monkeypatch.setattr(ddpm_jax.runs, "export", types.SimpleNamespace(export=run("export")), raising=False)
  monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main sets another
  monkeypatch.setattr(main.terminal, "quiet", lambda: None)

  def initialize(mode, heartbeat_timeout):
    record.calls.append(("distributed", mode, heartbeat_timeout))
    return distributed.Job(kind="single")

  monkeypatch.setattr(distributed, "initialize", initialize)
  return record


@pytest.fixture
def command():
  """Runs `main` in this process as the command line would; returns the exit code."""
  if "workdir" not in absl_flags.FLAGS:
    flags.define()

  def call(*arguments: object, rest: tuple[str, ...] = ()) -> int:
    with flagsaver.flagsaver():
      absl_flags.FLAGS.unparse_flags()
      try:
        left = main._parse_flags(["main", *map(str, arguments), *rest])
      except SystemExit as stop:
        return stop.code
      return main.main(left)

  return call


def one_line(capsys) -> str:
  out, err = capsys.readouterr()
  assert out == ""
  assert err.count("\n") == 1
  assert err.startswith("error: ")
  return err


def test_train(runs, command, tmp_path):
  assert command(f"--workdir={tmp_path}", "--channels=64") == 0
  expected = config_lib.override(Config(), {"channels": 64})
  assert runs.calls == [("distributed", "auto", 100), ("train", expected, tmp_path)]


def test_a_stop_has_the_exit_code_that_was_asked_for(runs, command, tmp_path, monkeypatch):
  """And no other end; a stop that comes while the settings are not known yet has it, too."""
  stops, named, finished = [], [], [False, False, True, True, False]

  def train(config, folder, invocation):
    stops.append(invocation.stop.exit_code)
    named.append(invocation.given)
    return finished.pop(0)

  monkeypatch.setattr(ddpm_jax.runs.train, "train", train)
  codes = [command(f"--workdir={tmp_path}", *flags) for flags in ([], ["--stop_exit_code=75"]) * 2]
  assert codes == [0, 75, 0, 0] and stops == [0, 75] * 2
  assert named == [frozenset(), frozenset({"stop_exit_code"})] * 2
  layout.create(tmp_path, config_lib.override(Config(), {"stop_exit_code": 99}))
  assert command(f"--workdir={tmp_path}") == 99 and stops[-1] == 99
  monkeypatch.setattr(ddpm_jax.runs.train, "train", lambda *_: True)
  monkeypatch.setattr(main, "StopRequest", lambda exit_code: stops.append(exit_code) or StopRequest(exit_code))
  command(f"--workdir={tmp_path}", "--stop_exit_code=75")
  command(f"--workdir={tmp_path}", "--stop_exit_code=75", "--mode=sample")
  assert stops[-2:] == [75, None]


def test_processes_are_joined_before_the_run_and_as_asked(runs, command, tmp_path):
  assert command(f"--workdir={tmp_path}", "--distributed=off", "--heartbeat_timeout=100") == 0
  assert runs.calls[0] == ("distributed", "off", 100)


def test_sample_takes_the_stored_config(runs, command, tmp_path):
  stored = config_lib.override(Config(), {"channels": 64, "sampler": "ddim"})
  layout.create(tmp_path, stored)
  assert command(f"--workdir={tmp_path}", "--mode=sample", "--num_samples=7") == 0
  assert runs.calls[-1] == ("sample", config_lib.override(stored, {"num_samples": 7}), tmp_path)


def test_evaluate_takes_the_stored_config(runs, command, tmp_path):
  stored = config_lib.override(Config(), {"channels": 64, "evaluate_samples": 100})
  layout.create(tmp_path, stored)
  assert command(f"--workdir={tmp_path}", "--mode=evaluate", "--measures=bound,ode", "--checkpoint=best") == 0
  expected = config_lib.override(stored, {"measures": ("bound", "ode"), "checkpoint": "best"})
  assert runs.calls[-1] == ("evaluate", expected, tmp_path)
  assert set(runs.more[0]) == {"measures", "checkpoint"}, "which flags were given, as those are never chosen otherwise"


def test_a_plan_needs_no_workdir_joins_no_job_and_writes_nothing(runs, command, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert command("--mode=plan", "--topology=v5e:4x4", "--channels=64", "--distributed=auto") == 0
  expected = config_lib.override(Config(), {"channels": 64, "topology": "v5e:4x4"})
  assert runs.calls == [("distributed", "off", 100), ("plan", expected, None)]
  assert command("--mode=plan", f"--workdir={tmp_path / 'later'}", "--channels=64", "--topology=v5e:4x4") == 0
  assert runs.calls[-1] == ("plan", expected, tmp_path / "later")
  assert list(tmp_path.iterdir()) == []


def test_a_plan_of_a_run_may_change_all_of_it(runs, command, tmp_path):
  stored = config_lib.override(Config(), {"channels": 64, "num_steps": 777})
  layout.create(tmp_path, stored)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  assert command("--mode=plan", f"--workdir={tmp_path}", "--batch_size=256", "--dtype=bfloat16") == 0
  assert runs.calls[-1] == ("plan", config_lib.override(stored, {"batch_size": 256, "dtype": "bfloat16"}), tmp_path)
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_exit_codes(runs, command, capsys, tmp_path):
  errors = (
    (UserError("a: b"), 2),
    (BadRecord("image 3", "mend"), 2),
    (NonFiniteError("loss nan"), 3),
    (RunError("x"), 1),
  )
  for mode in ("train", "sample", "evaluate", "export", "plan"):
    for runs.error, code in errors:
      if mode != "train":
        layout.create(tmp_path, Config())
      assert command(f"--workdir={tmp_path}", f"--mode={mode}") == code, (mode, runs.error)
      assert one_line(capsys) == f"error: {runs.error}\n"


def test_a_failure_keeps_its_traceback(runs, command, tmp_path):
  runs.error = RuntimeError("out of memory")  # Python itself makes this exit code 1
  with pytest.raises(RuntimeError, match="out of memory"):
    command(f"--workdir={tmp_path}")


BAD_INPUT = [
  (["--chanels=64"], ["chanels", "channels"]),
  (["--beta_schedule=square"], ["beta_schedule", "square", "cosine"]),
  (["--sampler=euler"], ["sampler", "euler", "ddim"]),
  (["--mode=dance"], ["mode", "dance", "sample"]),
  (["--channels=many"], ["channels", "many"]),
  (["--channel_multipliers=1,x"], ["channel_multipliers", "1,x", "commas"]),
  (["--random_flip=perhaps"], ["random_flip", "perhaps"]),
  (["--channels"], ["channels", "value"]),
  (["--flagfile=nowhere.flags"], ["flagfile", "nowhere.flags", "No such file"]),
  (["--flagfile="], ["flagfile", "empty", "flags.txt"]),
  (["--flagfile"], ["flagfile", "empty"]),
  (["--flagfile", "/"], ["flagfile", "Is a directory"]),
  (["--batch_size=0"], ["batch_size", "0", "at least 1"]),
  (["--learning_rate=nan"], ["learning_rate", "nan", "finite"]),
  (["--learning_rate=-1"], ["learning_rate", "-1", "greater than 0"]),
  (["--grad_accum_steps=3"], ["grad_accum_steps", "3", "batch_size="]),
  (["--mode=sample"], ["workdir", "run", "holds no run", "ddpm_jax.main"]),
  (["--mode=evaluate"], ["workdir", "run", "holds no run", "ddpm_jax.main"]),
  (["--mode=export"], ["workdir", "run", "holds no run", "ddpm_jax.main"]),
  (["--mode=export", "--workdir="], ["workdir", "--workdir", "--init_from"]),
  (["--mode=export", "--init_from=x"], ["init_from", "there is no", "nothing is downloaded"]),
  (["--export_format=onnx"], ["export_format", "onnx", "safetensors"]),
  (["--init_from=nowhere"], ["init_from", "nowhere", "there is no", "nothing is downloaded"]),
  (["--mode=sample", "--init_from=s3://x/y"], ["init_from", "s3://x/y", "is no path"]),
  ([f"--init_from={'a' * 300}"], ["init_from", "cannot be looked at (File name too long)", "name another path"]),
  (["--init_from=~nobody_here/x"], ["init_from", "'~nobody_here/x' begins with the home of nobody here"]),
  (["--compilation_cache=~nobody_here/x"], ["compilation_cache", "begins with the home of nobody here"]),
  (["--init_from=two\nlines"], ["init_from", "the character '\\n'", "use another --init_from"]),
  (["--init_from=a\udcff"], ["init_from", "is not UTF-8", "use another --init_from"]),
  ([f"--workdir={'a' * 300}"], ["workdir", "cannot look into", "File name too long", "use another --workdir"]),
  (["--workdir=~nobody_here/x"], ["workdir", "'~nobody_here/x' begins with the home of nobody here"]),
  (["--measures=frechet,fid"], ["measures", "fid", "frechet"]),
  (["--measures="], ["measures", "empty"]),
  (["--features=vgg"], ["features", "vgg", "classifier"]),
  (["--features=inception"], ["inception_weights", "missing", "convert_inception.py"]),
  (["--inception_resize=clean"], ["inception_resize", "no effect", "--features=inception"]),
  (["--evaluate_samples=1"], ["evaluate_samples", "at least 2"]),
  (["--evaluate_every=5", "--measures=kid"], ["best_measure", "frechet", "--measures=kid"]),
  (["--evaluate_every=5", "--best_measure=ode"], ["best_measure", "ode", "--measures="]),
  (["--best_measure=kid"], ["best_measure", "no effect", "--evaluate_every"]),
  (["--checkpoint=last"], ["checkpoint", "last", "newest"]),
  (["--export_format=jax", "--export_platforms=cpu,gpu"], ["export_platforms", "gpu", "cuda"]),
  (["--export_format=jax", "--export_platforms="], ["export_platforms", "empty", "cpu, cuda, tpu"]),
  (["--export_format=jax", "--export_platforms=cpu,cpu"], ["export_platforms", "cpu,cpu", "twice"]),
  (["--export_format=jax", "--export_batch_sizes=1,0"], ["export_batch_sizes", "0", "at least 1"]),
  (["--export_format=jax", "--export_batch_sizes=many"], ["export_batch_sizes", "many", "commas"]),
  (["--export_batch_sizes=8"], ["export_batch_sizes", "no effect", "--export_format=jax"]),
  (["--export_platforms=cpu"], ["export_platforms", "no effect", "--export_format=jax"]),
  (["channels=64"], ["channels=64", "--name=value"]),
  (["--workdir="], ["workdir", "missing", "--workdir="]),
]


def test_bad_input_is_one_line_and_exit_code_2(runs, command, capsys, tmp_path):
  wrong = []
  for arguments, parts in BAD_INPUT:
    code, text = command(f"--workdir={tmp_path / 'run'}", *arguments), one_line(capsys)
    if code != 2 or not all(part in text for part in parts):
      wrong.append((arguments, code, text))
  assert not wrong
  assert runs.calls == [] and list(tmp_path.iterdir()) == []


# What a command means.


def test_train_is_flags_over_the_stored_run(tmp_path):
  """What may not change is refused when the run starts, by `workdir.check`; a consent is for one command."""
  stored = config_lib.override(Config(), {"channels": 64, "num_steps": 777, "lr_schedule": "cosine"})
  layout.create(tmp_path, config_lib.override(stored, {"allow_data_change": True}))
  assert resolve.resolve_config("train", {}, tmp_path) == stored
  given = {"num_steps": 2000, "channels": 32}  # the defaults, but given
  assert resolve.resolve_config("train", given, tmp_path) == config_lib.override(stored, given)
  assert resolve.resolve_config("train", given, tmp_path / "new") == config_lib.override(Config(), given)


def test_a_workdir_of_an_older_release_goes_on_as_it_was(tmp_path):
  """Release 0.1.0 had a cosine by default, and knew no --decay_fraction."""
  stored = config_lib.override(Config(), {"lr_schedule": "cosine"})
  layout.create(tmp_path, stored)
  text = (tmp_path / "config.json").read_text()
  (tmp_path / "config.json").write_text(re.sub(r' *"decay_fraction": .*\n', "", text))
  assert text != (tmp_path / "config.json").read_text()
  config = resolve.resolve_config("train", {}, tmp_path)
  assert config == stored and layout.check(tmp_path, config)
  assert resolve.resolve_config("train", {"num_steps": 4000}, tmp_path).optimizer == stored.optimizer
  with pytest.raises(
    UserError, match=r"lr_schedule: .* 'cosine', .* 'constant_then_decay'; leave --lr_schedule out, or"
  ):
    layout.check(tmp_path, resolve.resolve_config("train", {"lr_schedule": "constant_then_decay"}, tmp_path))


def test_a_run_on_own_images_takes_the_preset_of_its_device_and_says_so(runs, command, capsys, tmp_path):
  """Unless the command names a preset or a flagfile, or the run exists: then its own settings count."""
  (tmp_path / "own.flags").write_text(f"--dataset=folder:{tmp_path / 'images'}\n")
  images, new = f"--dataset=folder:{tmp_path / 'images'}", f"--workdir={tmp_path / 'new'}"
  folder = {"dataset": f"folder:{tmp_path / 'images'}"}
  for words, expected, said in (
    ([images], flags.of_preset("images32") | folder, "--preset=images32"),
    ([images, "--channels=48"], flags.of_preset("images32") | folder | {"channels": 48}, "--preset=images32"),
    ([images, "--preset=images64"], flags.of_preset("images64") | folder, ""),
    ([images, "--preset=none"], folder, ""),
    *(
      ([f"--dataset={kind}:/x"], flags.of_preset("images32") | {"dataset": f"{kind}:/x"}, "--preset=images32")
      for kind in ("zip", "webdataset", "parquet")
    ),
    ([f"--flagfile={tmp_path / 'own.flags'}"], folder, ""),
    (["--dataset=cifar10"], {"dataset": "cifar10"}, ""),
    ([images, "--mode=plan"], flags.of_preset("images32") | folder, "--preset=images32"),
    ([images, "--mode=plan", "--topology=v5e:4x4"], flags.of_preset("images64") | folder, "--preset=images64"),
  ):
    place = [] if "--mode=plan" in words else [new]
    assert command(*place, *words) == 0
    config = runs.calls[-1][1]
    expected = config_lib.override(Config(), expected | {"topology": config.plan.topology})
    assert config == expected, words
    line = runs.said[-1] or capsys.readouterr().out
    assert said in line if said else not line, words
  of_preset = config_lib.override(Config(), flags.of_preset("images32") | folder)
  for stage in ("autoencoder", "classifier"):  # each takes what it has a use for
    assert command(new, images, f"--stage={stage}") == 0 and "--preset=images32" in runs.said[-1]
    config = runs.calls[-1][1]
    assert (config.data, config.optimizer, config.train) == (of_preset.data, of_preset.optimizer, of_preset.train)
    defaults = config_lib.override(Config(), {"stage": stage})
    if stage == "autoencoder":
      assert (config.model, config.diffusion) == (defaults.model, defaults.diffusion)
    else:
      assert config.model == dataclasses.replace(of_preset.model, stage=stage)
      assert config.diffusion.beta_schedule == "cosine" and config.diffusion.prediction == "eps"
  for mode in ("train", "plan"):  # and not the digits, which nobody asked for
    place = [] if mode == "plan" else [new]
    assert command(*place, f"--mode={mode}", "--preset=ldm_kl_f8") == 2
    assert one_line(capsys).startswith("error: dataset: --preset=ldm_kl_f8 is for images of your own; name them")
  assert command(new, images, "--beta_end=0.4") == 2
  assert "beta_end: 0.4 has no effect with beta_schedule=cosine" in (line := one_line(capsys))
  assert "own images take --preset=images32" in line
  stored = config_lib.override(Config(), folder | {"channels": 64})
  layout.create(tmp_path / "run", stored)
  assert command(f"--workdir={tmp_path / 'run'}", images) == 0
  assert runs.calls[-1][1] == stored and not runs.said[-1]
  assert presets.for_own_images("gpu") == presets.for_own_images("tpu") == "images64"
  borrowed = resolve.Command("train", folder | {"init_from": "x"}, None, tmp_path / "new")
  assert not resolve.takes_preset_of_device(borrowed)


def test_flags_are_checked_with_the_preset_for_own_images_and_not_with_the_defaults(runs, command, capsys, tmp_path):
  """A value that fits the preset and not the defaults is no error; an error over the preset names it, late ones too."""
  images, new = f"--dataset=folder:{tmp_path / 'images'}", f"--workdir={tmp_path / 'new'}"
  for flag in ("--norm_groups=32", "--norm_groups=8"):  # of 32 channels by default, 128 and 16 in the presets
    assert command(images, "--mode=plan", "--topology=v5e:4x4", flag) == 0, flag
  capsys.readouterr()
  assert command(images, "--mode=plan", "--topology=v5e:4x4", "--norm_groups=48") == 2
  assert "does not divide" in (line := one_line(capsys)) and "own images take --preset=" in line
  for error, named in (("image_size: 30 cannot be halved", True), ("dataset: no such folder", False)):
    runs.error = UserError(error)
    assert command(new, images) == 2
    assert (line := one_line(capsys)).startswith(f"error: {error}") and ("--preset=images32" in line) == named


def test_a_command_that_names_only_a_new_workdir_says_that_it_begins_a_run(runs, command, tmp_path):
  """A name that was misspelt does, too."""
  for words, said in ((["--num_steps=3"], True), (["--dataset=digits"], False), (["--preset=digits"], False)):
    assert command(f"--workdir={tmp_path / 'runs'}", *words) == 0
    assert (f"{tmp_path / 'runs'} holds no run yet: a new one begins there" in runs.said[-1]) == said, words
  layout.create(tmp_path, Config())
  assert command(f"--workdir={tmp_path}") == 0 and not runs.said[-1]


def test_attention_that_fits_the_images_is_that_of_the_run(tmp_path):
  stored = config_lib.override(Config(), {"attention_resolutions": (4,)})
  layout.create(tmp_path, stored)
  for mode in ("train", "sample"):
    assert resolve.resolve_config(mode, {"attention_resolutions": (0,)}, tmp_path) == stored


def test_sample_is_flags_over_the_stored_run(tmp_path):
  stored = config_lib.override(Config(), {"channels": 64, "num_timesteps": 100})
  layout.create(tmp_path, stored)
  for given in (
    {"sampler": "ddim", "eta": 0.5, "sampling_steps": 20, "channels": 64},
    {"sampler": "ddpm", "variance": "fixed_small", "num_samples": 3},
  ):
    assert resolve.resolve_config("sample", given, tmp_path) == config_lib.override(stored, given)


def test_sample_refuses_what_would_have_no_effect(tmp_path):
  layout.create(tmp_path, Config())
  with pytest.raises(UserError, match=r"variance: fixed_small has no effect with sampler=ddim; .*--sampler=ddpm"):
    resolve.resolve_config("sample", {"sampler": "ddim", "variance": "fixed_small"}, tmp_path)


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_what_reads_a_run_cannot_change_it(runs, command, capsys, tmp_path, mode):
  layout.create(tmp_path, Config())
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  for flag in ("--split=test", "--num_timesteps=999", "--random_flip"):
    assert command(f"--workdir={tmp_path}", f"--mode={mode}", flag) == 2
    assert f"leave {flag.split('=')[0]} out" in one_line(capsys)
  assert runs.calls == [] and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_sample_refuses_to_change_what_was_trained(tmp_path):
  layout.create(tmp_path, config_lib.override(Config(), {"channel_multipliers": (1, 2)}))
  with pytest.raises(UserError) as caught:
    resolve.resolve_config("sample", {"channel_multipliers": (1, 4)}, tmp_path)
  for part in ("channel_multipliers: ", "'1,2'", "'1,4'", "leave --channel_multipliers out"):
    assert part in str(caught.value)


def test_sample_checks_its_flags_against_the_stored_run(tmp_path):
  layout.create(tmp_path, config_lib.override(Config(), {"num_timesteps": 100}))
  with pytest.raises(UserError, match=r"sampling_steps: 200 .*num_timesteps=100"):
    resolve.resolve_config("sample", {"sampling_steps": 200}, tmp_path)


def test_no_class_that_a_workdir_names_is_imported(tmp_path, capsys):
  """It may be somebody else's."""
  layout.create(tmp_path, config_lib.override(Config(), {"writers": "tensorboard,a.b:C"}))
  assert resolve.resolve_config("train", {}, tmp_path).train.writers == "tensorboard"
  assert capsys.readouterr().err == (
    "warning: writers: tensorboard,a.b:C names a class, which counts for the command that names it; give --writers "
    "again\n"
  )
  for mode, given in (("train", {"writers": "a.b:C"}), ("sample", {}), ("evaluate", {})):
    assert resolve.resolve_config(mode, given, tmp_path).train.writers == given.get("writers", "tensorboard")
  assert capsys.readouterr().err == ""


def test_statistics_of_a_data_set_need_no_run(runs, command, capsys, tmp_path):
  given = {"write_reference": "x.npz", "dataset": "cifar10"}
  assert resolve.resolve_config("evaluate", given, None) == config_lib.override(Config(), given)
  assert command("--mode=evaluate", "--write_reference=x.npz") == 0
  assert [call[0] for call in runs.calls] == ["distributed", "evaluate"]
  layout.create(tmp_path, config_lib.override(Config(), {"split": "test"}))
  assert resolve.resolve_config("evaluate", {"write_reference": "x.npz"}, tmp_path).data.split == "test"
  for mode in ("train", "sample"):
    assert command(f"--workdir={tmp_path}", "--write_reference=x.npz", f"--mode={mode}") == 2
    assert one_line(capsys).startswith("error: write_reference: is for --mode=evaluate")
  assert command("--mode=evaluate") == 2
  assert one_line(capsys).startswith("error: workdir: missing")


# With --init_from.


@pytest.fixture
def model(tmp_path) -> str:
  """A workdir that --init_from can name: its settings are all that is asked for here."""
  layout.create(tmp_path / "model", config_lib.override(Config(), {"channels": 48, "num_timesteps": 40} | PREVIEW))
  return str(tmp_path / "model")


PREVIEW = {"preview_steps": 5, "threshold": "none", "variance": "fixed_small", "num_steps": 777}


def test_what_comes_with_weights_takes_the_place_of_the_defaults(model, tmp_path):
  for mode in ("train", "plan", "sample", "evaluate"):
    config = resolve.resolve_config(mode, {"init_from": model, "dropout": 0.1}, tmp_path / "run")
    expected = {"channels": 48, "num_timesteps": 40, "preview_steps": 5, "threshold": "none", "variance": "fixed_small"}
    assert config == config_lib.override(Config(), expected | {"init_from": model, "dropout": 0.1})
  assert resolve.resolve_config("export", {"init_from": model}, None).model.channels == 48
  assert not (tmp_path / "run").exists()


def test_a_path_is_kept_as_an_absolute_one(model, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for mode in ("train", "sample"):
    assert resolve.resolve_config(mode, {"init_from": "model"}, tmp_path / "run").exchange.init_from == model
    guides = {"guidance_scale": (2.0,), "guide_with": "model", "classifier": "model", "init_from": model}
    sample = resolve.resolve_config(mode, guides, tmp_path / "run").sample
    assert (sample.guide_with, sample.classifier) == (model, model)
    for text in ("raw", "300"):
      kept = resolve.resolve_config(mode, guides | {"guide_with": text}, tmp_path / "run")
      assert kept.sample.guide_with == text


def test_only_models_that_draw_begin_with_weights_of_elsewhere(model, tmp_path):
  """Said of the option that was given, and not of a setting that comes with it."""
  for stage in ("autoencoder", "classifier"):
    with pytest.raises(UserError, match=rf"^init_from: {model} has no effect with stage={stage}; leave it out$"):
      resolve.resolve_config("train", {"init_from": model, "stage": stage, "channels": 96}, tmp_path / "run")


def test_a_run_goes_on_where_its_first_weights_are_gone(model, tmp_path):
  config = resolve.resolve_config("train", {"init_from": model, "channels": 96}, tmp_path / "run")
  layout.create(tmp_path / "run", config)
  (tmp_path / "model" / "config.json").unlink()
  assert resolve.resolve_config("train", {"init_from": model}, tmp_path / "run") == config
  for mode in ("train", "sample"):
    assert resolve.resolve_config(mode, {}, tmp_path / "run") == config
  with pytest.raises(UserError, match="init_from: "):
    resolve.resolve_config("train", {"init_from": model}, tmp_path / "new")


def test_weights_of_elsewhere_get_their_data_set_when_they_are_measured(model, tmp_path):
  """As often as they like: each result says what it was measured on."""
  folder = tmp_path / "run"
  layout.create(folder, resolve.resolve_config("sample", {"init_from": model}, folder))
  for given in ({"init_from": model, "dataset": "mnist"}, {"dataset": "mnist"}):
    assert resolve.resolve_config("evaluate", given, folder).data.dataset == "mnist"
  with pytest.raises(UserError, match=rf"channels: {folder} was made with '48', not '64'; leave --channels out"):
    resolve.resolve_config("evaluate", {"channels": 64}, folder)
  (folder / "eval").mkdir()
  assert resolve.resolve_config("evaluate", {"dataset": "mnist"}, folder).data.dataset == "mnist"
  (folder / "metrics.jsonl").touch()
  with pytest.raises(UserError, match=rf"dataset: {folder} was trained with 'digits', .* leave --dataset out"):
    resolve.resolve_config("evaluate", {"dataset": "mnist"}, folder)


def test_what_named_the_first_weights_names_none_of_the_run_itself(model, tmp_path):
  folder, named = tmp_path / "run", {"checkpoint": "4", "sample_weights": "raw"}
  layout.create(folder, resolve.resolve_config("train", {"init_from": model} | named, folder))
  which = lambda mode, **given: resolve.resolve_config(mode, given, folder).sample  # noqa: E731
  assert (which("sample").checkpoint, which("sample").sample_weights) == ("4", "raw")  # nothing is trained yet
  (folder / "checkpoints" / "3").mkdir(parents=True)
  for mode in ("train", "sample", "evaluate", "export"):
    assert (which(mode).checkpoint, which(mode).sample_weights) == ("newest", "ema")
  assert which("sample", checkpoint="3").checkpoint == "3"


def test_a_plan_of_a_run_with_other_weights(model, tmp_path):
  """What comes with them wins over the run, and flags over both."""
  stored = config_lib.override(Config(), {"channels": 64, "batch_size": 32, "preview_steps": 7})
  layout.create(tmp_path / "run", stored)
  config = resolve.resolve_config("plan", {"init_from": model, "dropout": 0.1}, tmp_path / "run")
  theirs = {"channels": 48, "num_timesteps": 40, "preview_steps": 5, "threshold": "none", "variance": "fixed_small"}
  assert config == config_lib.override(stored, theirs | {"init_from": model, "dropout": 0.1})


def test_a_workdir_of_another_run_keeps_its_weights(model, tmp_path):
  layout.create(tmp_path / "run", Config())
  with pytest.raises(UserError, match=r"init_from: .* was trained with '', not '.*model'; leave --init_from out"):
    resolve.resolve_config("sample", {"init_from": model}, tmp_path / "run")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "metrics.jsonl").write_text("mine")
  with pytest.raises(UserError, match=r"holds no run, but has metrics\.jsonl"):
    resolve.resolve_config("sample", {"init_from": model}, tmp_path / "full")


def test_an_export_is_of_one_model(model, tmp_path):
  layout.create(tmp_path / "run", Config())
  assert resolve.resolve_config("export", {"variance": "fixed_small", "sampler": "ddim"}, tmp_path / "run")
  for given, folder in (({"init_from": model}, tmp_path / "run"), ({}, None)):
    with pytest.raises(UserError, match="workdir: name either a run to export"):
      resolve.resolve_config("export", given, folder)
  began = resolve.resolve_config("train", {"init_from": model}, tmp_path / "tuned")
  layout.create(tmp_path / "tuned", began)
  assert resolve.resolve_config("export", {"init_from": model}, tmp_path / "tuned") == began
  with pytest.raises(UserError, match="workdir: name either a run to export"):
    resolve.resolve_config("export", {"init_from": str(tmp_path / "run")}, tmp_path / "tuned")


def test_weights_may_be_used_in_another_arithmetic_than_they_were_trained_in(tmp_path):
  stored = config_lib.override(Config(), {"dtype": "bfloat16", "matmul_precision": "high"})
  layout.create(tmp_path, stored)
  given = {"dtype": "float32", "matmul_precision": "highest"}
  for mode, more in (("sample", {}), ("evaluate", {}), ("export", {"export_format": "jax"})):
    assert resolve.resolve_config(mode, given | more, tmp_path) == config_lib.override(stored, given | more)
  # Where parameters are only written, in float32, it would change nothing.
  for name, value in given.items():
    with pytest.raises(UserError, match=rf"^{name}: .* was trained with '.*', not '{value}'; leave --{name} out$"):
      resolve.resolve_config("export", {name: value}, tmp_path)
    resumed = resolve.resolve_config("train", {"dtype": "bfloat16", "matmul_precision": "high", name: value}, tmp_path)
    with pytest.raises(UserError, match=rf"^{name}: .* this command says '{value}'"):
      layout.check(tmp_path, resumed)


def test_what_was_trained_is_said_before_what_it_would_mean_beside_the_rest(tmp_path):
  """Not that --num_classes has no effect then, which the command does not name."""
  stored = {
    "by_class": {"conditioning": "class", "num_classes": 10, "label_dropout": 0.1},
    "classifier": {"stage": "classifier", "num_classes": 10},
    "plain": {},
  }
  for name, options in stored.items():
    layout.create(tmp_path / name, config_lib.override(Config(), options))
  cases = [
    ("train", "by_class", "conditioning", "none"),
    ("sample", "by_class", "conditioning", "none"),
    ("train", "classifier", "conditioning", "class"),
    ("evaluate", "plain", "label_dropout", 0.1),
  ]
  told = []
  for mode, folder, name, value in cases:
    with pytest.raises(UserError) as caught:
      resolve.resolve_config(mode, {name: value}, tmp_path / folder)
    told.append(str(caught.value))
  wrong = [
    text
    for text, (_, folder, name, value) in zip(told, cases, strict=True)
    if not (text.startswith(f"{name}: {tmp_path / folder} was trained with '") and f", not '{value}'; leave" in text)
  ]
  assert not wrong


def test_an_environment_that_changes_numbers_is_refused(runs, command, tmp_path, capsys):
  with jax.enable_x64(True):
    assert command(f"--workdir={tmp_path}") == 2
  assert one_line(capsys).startswith("error: JAX_ENABLE_X64: True ")
  with jax.default_matmul_precision("high"):
    assert command(f"--workdir={tmp_path}") == 2
    assert one_line(capsys).startswith(
      "error: JAX_DEFAULT_MATMUL_PRECISION: high contradicts --matmul_precision=default"
    )
    assert command(f"--workdir={tmp_path}", "--matmul_precision=high") == 0
  assert [call[0] for call in runs.calls] == ["distributed", "train"]


def test_a_variance_is_no_part_of_an_exported_sampler_that_has_none(tmp_path):
  layout.create(tmp_path, Config())
  given = {"export_format": "jax", "variance": "fixed_small"}
  assert resolve.resolve_config("export", given, tmp_path).diffusion.variance == "fixed_small"
  with pytest.raises(UserError, match="variance: fixed_small has no effect with sampler=ddim"):
    resolve.resolve_config("export", given | {"sampler": "ddim"}, tmp_path)


# The command itself.

_LOADED = (
  "import sys, ddpm_jax.main; "
  "print([name for name in ('flax', 'orbax', 'optax', 'grain', 'tensorflow_datasets', 'tensorflow', 'tensorboardX') "
  "if name in sys.modules])"
)


VERSIONS = (
  f"ddpm_jax {ddpm_jax.__version__}\nJAX {jax.__version__}\njaxlib {jaxlib.__version__}\n"
  f"Python {sys.version.split()[0]}\n"
)


def test_the_command(tmp_path):
  start = [sys.executable, "-m", "ddpm_jax.main"]
  commands = {
    "unknown flag": [*start, "--chanels=64"],
    "bad value": [*start, f"--workdir={tmp_path / 'a'}", "--batch_size=0"],
    # Found after the imports of a run, whose libraries like to talk.
    "no folder": [*start, f"--workdir={tmp_path / 'b'}", f"--dataset=folder:{tmp_path / 'none'}"],
    "help": [*start, "--help"],
    "version": [*start, "--version", "--mode=sample"],
    "imports": [sys.executable, "-c", _LOADED],
  }
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  environment.pop("JAX_PLATFORMS")
  options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path}
  children = {name: subprocess.Popen(line, **options) for name, line in commands.items()}
  ended = {name: (*child.communicate(timeout=120), child.returncode) for name, child in children.items()}

  for name, word in (("unknown flag", "chanels"), ("bad value", "batch_size: 0"), ("no folder", "folder:")):
    out, err, code = ended[name]
    assert (out, code) == ("", 2), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err
  assert ended["imports"] == ("[]\n", "", 0)
  assert ended["version"] == (VERSIONS, "", 0)
  assert ended["help"][1:] == ("", 0)
  assert "--workdir" in ended["help"][0]
  assert "--channel_multipliers" in ended["help"][0]
  assert list(tmp_path.iterdir()) == []
