import pathlib
import re

import pytest
from absl import flags as absl_flags

from ddpm_jax import config as config_lib
from ddpm_jax import flags, presets
from ddpm_jax.config import Config
from ddpm_jax.config import option as option
from ddpm_jax.errors import UserError

# People and scripts use these: they stay.
NAMES = {
  *("workdir", "mode", "version", "seed"),
  *("dataset", "data_dir", "manual_dir", "image_size", "batch_size", "random_flip"),
  *("num_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction", "loss", "loss_weighting", "variance"),
  *("channels", "channel_multipliers", "num_res_blocks", "attention_resolutions", "dropout", "dtype", "remat"),
  *("learning_rate", "lr_schedule", "warmup_steps", "grad_clip", "ema_decay"),
  *("num_steps", "parallel", "grad_accum_steps", "log_every", "checkpoint_every", "sample_every", "keep_checkpoints"),
  *("distributed", "num_samples", "sampler", "sampling_steps", "eta", "sample_batch_size"),
  *("sample_task", "checkpoint", "time_grid", "threshold", "threshold_quantile", "input_images", "mask"),
  *("evaluate_every", "best_measure", "measures", "features"),
}


@pytest.fixture
def registry() -> absl_flags.FlagValues:
  """The flags of this package alone, not yet parsed."""
  values = absl_flags.FlagValues()
  flags.define(values)
  return values


def parse(registry, *arguments) -> dict:
  registry(["main", *arguments])
  return flags.given(registry)


def test_names_that_stay(registry):
  assert set(registry) >= NAMES


def test_one_flag_for_each_option_with_its_default_and_help(registry):
  options = {field.name: (default, field.metadata["help"]) for _, field, default in config_lib.options(Config())}
  assert set(registry) == {"workdir", "mode", "preset", "version"} | set(options)
  for name, (default, text) in options.items():
    assert registry[name].default == default
    assert type(registry[name].default) is type(default)
    assert text in registry[name].help


def test_defaults_are_not_given(registry):
  assert parse(registry) == {}
  assert registry.mode == "train"


def test_values_have_the_type_of_their_option(registry):
  given = parse(
    registry,
    *("--channels=64", "--dropout=0", "--random_flip", "--dataset=cifar10", "--channel_multipliers=1,2,4"),
    *("--attention_resolutions=", "--loss=l1", "--learning_rate=2e-4"),
  )
  assert given == {
    "channels": 64,
    "dropout": 0.0,
    "random_flip": True,
    "dataset": "cifar10",
    "channel_multipliers": (1, 2, 4),
    "attention_resolutions": (),
    "loss": "l1",
    "learning_rate": 2e-4,
  }
  assert isinstance(given["dropout"], float)


def test_a_flag_that_repeats_the_default_is_given(registry):
  assert parse(registry, "--channels=32", "--norandom_flip") == {"channels": 32, "random_flip": False}


def test_the_last_of_two_wins(registry):
  assert parse(registry, "--channels=64", "--channels=48") == {"channels": 48}


@pytest.mark.parametrize(
  ("text", "value"), [("16", (16,)), ("1,2,2,2", (1, 2, 2, 2)), ("1, 2", (1, 2)), ("", ()), ("-1", (-1,))]
)
def test_tuples(registry, text, value):
  assert parse(registry, f"--channel_multipliers={text}") == {"channel_multipliers": value}


@pytest.mark.parametrize(
  ("text", "value"), [("64", 64), ("0", 0), ("48x64", "48x64"), ("64x48", "64x48"), ("64x64", 64), ("wide", "wide")]
)
def test_sizes(registry, text, value):
  """The option refuses what is none."""
  assert parse(registry, f"--image_size={text}") == {"image_size": value}


@pytest.mark.parametrize("text", ["1,x", "1.5", "1,,2", "1;2", "(1,2)", ","])
def test_bad_tuples(registry, text):
  with pytest.raises(absl_flags.IllegalFlagValueError, match=r"channel_multipliers=.*separated by commas.*1,2,2,2"):
    parse(registry, f"--channel_multipliers={text}")


@pytest.mark.parametrize(
  ("text", "value"), [("kid", ("kid",)), ("kid,ode", ("kid", "ode")), ("kid, ode", ("kid", "ode")), ("", ())]
)
def test_tuples_of_words(registry, text, value):
  assert parse(registry, f"--measures={text}") == {"measures": value}


def test_an_unknown_word_in_a_list_is_refused_with_those_that_are_known(registry):
  for text, word in (("kid,fid", "fid"), ("kid,,ode", ""), (",", "")):
    with pytest.raises(UserError, match=f"measures: '{word}' is unknown; use one of frechet, kid"):
      config_lib.override(Config(), parse(registry, f"--measures={text}"))


@pytest.mark.parametrize(
  "argument",
  [
    "--channels=a",
    "--channels=1.5",
    "--num_steps=10k",
    "--learning_rate=1e-",
    "--batch_size=",
    "--dropout=none",
    "--random_flip=perhaps",
    "--mode=dance",
  ],
)
def test_bad_values_name_the_flag(registry, argument):
  name, value = argument.removeprefix("--").split("=")
  with pytest.raises(absl_flags.IllegalFlagValueError, match=f"{name}={value}") as refused:
    parse(registry, argument)
  assert "literal" not in str(refused.value) and "convert" not in str(refused.value)  # Python's words


def test_enum_lists_what_is_known(registry):
  with pytest.raises(absl_flags.IllegalFlagValueError, match=r"beta_schedule=square.*linear.*quadratic.*cosine"):
    parse(registry, "--beta_schedule=square")


def test_unknown_flag_suggests_the_near_one(registry):
  with pytest.raises(absl_flags.UnrecognizedFlagError, match=r"chanels.*channels"):
    parse(registry, "--chanels=64")
  for word, meant in (
    ("lr", "--learning_rate"),
    ("schedule", "--beta_schedule or --lr_schedule"),
    ("steps", "mean --num_steps or"),
    ("chanels", "mean --channels"),
    ("zzz", ""),
  ):
    with pytest.raises(absl_flags.UnrecognizedFlagError) as refused:
      parse(registry, f"--{word}=1")
    assert meant in flags.one_line(refused.value) and ("did you mean" in flags.one_line(refused.value)) == bool(meant)


def test_every_default_survives_its_own_text(registry):
  given = parse(registry, *(f"--{n}={config_lib.flag_text(v)}" for n, v in config_lib.values(Config()).items()))
  assert given == config_lib.values(Config())


PLACES = ("data_dir", "inception_weights", "lpips_weights")


def test_places_of_data_are_absolute(registry, tmp_path, monkeypatch):
  """A later command may come from another working directory."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/me")
  for text, path in [
    *(("pics", f"{tmp_path}/pics"), ("./pics/", f"{tmp_path}/pics"), ("../pics", f"{tmp_path.parent}/pics")),
    *(("/data//pics/.", "/data/pics"), ("~/pics", "/home/me/pics"), ("a: b", f"{tmp_path}/a: b"), ("", "")),
  ]:
    for kind in ("folder", "zip", "webdataset", "parquet"):
      given = parse(registry, f"--dataset={kind}:{text}", *(f"--{name}={text}" for name in PLACES))
      assert given == {"dataset": f"{kind}:{path}"} | dict.fromkeys(PLACES, path)
  (tmp_path / "far" / "away").mkdir(parents=True)
  (tmp_path / "link").symlink_to("far/away")  # so link/.. is far
  assert parse(registry, "--data_dir=./link/../pics/")["data_dir"] == f"{tmp_path}/link/../pics"
  assert parse(registry, "--dataset=lsun/bedroom", "--data_dir=gs://bucket", "--inception_weights=") == {
    "dataset": "lsun/bedroom",
    "data_dir": "gs://bucket",
    "inception_weights": "",
    "lpips_weights": "",  # of the parse before
  }
  with pytest.raises(UserError, match="dataset: '~nobody_here/x' begins with the home of nobody"):
    parse(registry, "--dataset=folder:~nobody_here/x")


def holds(registry, tmp_path, texts) -> bool:
  """Whether a flagfile gives these back as the values of flags."""
  lines = [f"--mask={text}" for text in texts]
  (tmp_path / "flags.txt").write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))
  try:
    return registry.read_flags_from_files([f"--flagfile={tmp_path / 'flags.txt'}"], force_gnu=True) == lines
  except UnicodeDecodeError:
    return False


def test_texts_that_a_flagfile_cannot_hold_are_refused_for_every_flag_and_no_others(registry, tmp_path):
  fields = [f for _, f, default in config_lib.options(Config()) if type(default) is str and not f.metadata["choices"]]
  assert {"dataset", "split", "data_dir", "checkpoint", "mask", "topology", "init_from"} <= {f.name for f in fields}
  letters = [chr(code) for code in (*range(1, 0x3100), 0xD800, 0xDFFF, 0xFEFF, 0xFFFD, 0x1F600)]
  texts = [text for letter in letters for text in (f"a{letter}b", f"{letter}b", f"a{letter}")]
  texts += ["", "--seed=1", "a=b,c", "'a b'", '"', "#", "a # b", "//", "$HOME", "--", "\\n", "  a"]

  def refused(field, text):
    try:
      option.check_range(field, text)
    except UserError as error:
      return str(error).startswith(f"{field.name}: ") and str(error).isprintable()
    return False

  bad = {text for text in texts if refused(fields[0], text)}
  for field in fields[1:]:
    assert {text for text in [*bad, "a b"] if refused(field, text)} == bad, field.name
  assert holds(registry, tmp_path, [text for text in texts if text not in bad])
  assert [text for text in bad if holds(registry, tmp_path, [text])] == []
  assert {"a\n", "a\rb", "a ", "a\udfffb"} <= bad
  assert all(refused(field, "a\0b") for field in fields)  # which no path can hold


def test_flags_into_string_is_itself_a_command_line(registry):
  registry(["main", "--channel_multipliers=1,2,4"])
  assert "--channel_multipliers=1,2,4" in registry.flags_into_string().splitlines()


# Flagfiles.

# file -> its lines; what is read from them in a run is batch_size, by name below.
FILES = {
  "a": "--batch_size=1\n--num_steps=500\n",
  "b": "--batch_size=2",
  "marked": "\ufeff--batch_size=3\r\n  # no flag\n// none either\n\n",
  "outer": "--batch_size=4\n--flagfile={a}\n",
  "outermost": "--flagfile {outer}\n-flagfile={b}\n",
  "sp ace": "--batch_size=5\n",
  "circle": "--flagfile={round}\n",
  "round": "-flagfile={circle}",
  "latin": b"--dataset=folder:\xe9",
  "bare": "--batch_size=6\nchannels=64\n",
}
WINS = [  # words of a command -> batch_size
  ("--flagfile={a}", 1),
  ("--batch_size=9 --flagfile={a}", 9),
  ("--flagfile={a} --batch_size=9", 9),
  ("--batch_size=9 --flagfile {a}", 9),
  ("--batch_size=9 -flagfile={a}", 9),
  ("--batch_size=9 -flagfile {a}", 9),
  ("--batch_size 9 --flagfile {a} --seed 3", 9),
  ("-batch_size=9 --seed=3 --flagfile={a} -flagfile={b}", 9),
  ("--flagfile={a} --flagfile={b}", 2),
  ("--flagfile={b} --seed 3 --flagfile {a}", 1),
  ("--flagfile={marked}", 3),
  ("--flagfile={outer}", 4),  # its own lines win over those of the file that it names
  ("--flagfile={outermost}", 2),
  ("--batch_size=9 --flagfile={outermost}", 9),
  ("--flagfile={sp ace}", 5),
  ("--batch_size=9 -- --flagfile={a}", 9),
]
REFUSED = [  # words of a command -> what the error says
  ("--flagfile=", "flagfile: empty"),
  ("-flagfile=", "flagfile: empty"),
  ("--seed=3 --flagfile", "flagfile: empty"),
  ("--flagfile={none}", "flagfile: cannot read .*none .No such file or directory."),
  ("--flagfile={circle}", "flagfile: .*circle includes itself"),
  ("--flagfile={latin}", "flagfile: .*latin is not UTF-8"),
  ("--flagfile=~nobody_here/x", "flagfile: '~nobody_here/x' begins with the home of nobody here"),
  (
    "--preset=imges32",
    r"preset: 'imges32' is unknown \(did you mean images32\?\); use one of celebahq256, cifar10, .*, or none",
  ),
  ("--preset", "preset: '' is unknown"),
]


def test_a_flag_of_the_command_line_wins_over_flagfiles_wherever_they_stand(tmp_path):
  for name, text in FILES.items():
    text = text if isinstance(text, bytes) else text.format_map(_Paths(tmp_path)).encode()
    (tmp_path / name).write_bytes(text)

  def expand(command):
    words = [word.format_map(_Paths(tmp_path)) for word in re.split(r" (?!ace)", command)]
    registry = absl_flags.FlagValues()
    flags.define(registry)
    rest = registry(["main", *flags.expand_flagfiles(words)])[1:]
    return flags.given(registry), rest

  wrong = {command: found for command, value in WINS if (found := expand(command)[0].get("batch_size")) != value}
  assert not wrong
  assert expand("--batch_size=9 --flagfile={a}")[0] == {"batch_size": 9, "num_steps": 500}
  assert expand("--flagfile={bare}")[1] == ["channels=64"]  # `main` refuses what is no flag
  for command, message in REFUSED:
    with pytest.raises(UserError, match=f"^{message}"):
      expand(command)


def test_a_preset_is_its_flagfile():
  """From an installed package too; what was named last is what `--preset` says."""

  def read(*words):
    registry = absl_flags.FlagValues()
    flags.define(registry)
    return parse(registry, *flags.expand_flagfiles(words)), flags.preset(registry)

  files = {path.stem: path for path in (pathlib.Path(__file__).parents[1] / "experiments").glob("*.flags")}
  assert set(files) == set(presets.names())
  for name, path in files.items():
    expected = flags.of_preset(name) | {"seed": 3}
    assert read(f"--preset={name}", "--seed=3") == (expected, name)
    assert read("--seed=3", f"--flagfile={path}") == (expected, "none")
  for words, last in (
    (["--preset", "cifar10", "--preset=none"], "none"),
    (["--preset=none"], "none"),
    ([f"--flagfile={files['cifar10']}", "-preset", "images32"], "images32"),
    (["--seed=3"], None),
  ):
    assert read(*words)[1] == last


class _Paths(dict):
  """The name of a file of the test -> its path."""

  def __init__(self, folder):
    self._folder = folder

  def __missing__(self, name):
    return str(self._folder / name)


@pytest.mark.parametrize("arguments", [(), ("--workdir=",)])
def test_missing_workdir(registry, arguments):
  registry(["main", *arguments])
  with pytest.raises(UserError, match=r"workdir: missing; .*--workdir="):
    flags.workdir(registry)


def test_a_workdir_in_a_bucket_is_refused_not_made_on_disk(registry):
  registry(["main", "--workdir=gs://bucket/run"])
  with pytest.raises(UserError, match="workdir: 'gs://bucket/run' is no path"):
    flags.workdir(registry)


def test_workdir_is_absolute(registry, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  registry(["main", "--workdir=runs/a"])
  assert flags.workdir(registry) == pathlib.Path(tmp_path, "runs", "a")
  registry(["main", "--workdir=~/a"])
  assert flags.workdir(registry) == pathlib.Path(tmp_path, "home", "a")
