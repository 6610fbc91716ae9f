"""Drawing by class and with guidance: which class each image is of, what it depends on, and what it costs."""

import dataclasses
import re
from decimal import Decimal, getcontext

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.data.sources import from_array
from ddpm_jax.devices import make_mesh
from ddpm_jax.diffusion.denoiser import Denoiser
from ddpm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.errors import UserError
from ddpm_jax.keys import seeded
from ddpm_jax.runs import sample as sampling
from ddpm_jax.sampling import classes as classes_lib
from ddpm_jax.sampling import draw as draw_lib
from ddpm_jax.sampling import inputs
from ddpm_jax.sampling.draw import bind_for_sampling, make_draw, table_of
from ddpm_jax.training.setup import build_run
from ddpm_jax.weights import initial
from ddpm_jax.weights.load import Weights
from tests.sampling.conftest import Trained, make_workdir, pictures, settings_of
from tests.training.tiny import CONDITIONAL, IMAGE_SHAPE

NAMES = ("cats", "dogs", "flags")
GREY = (-0.5, 0.0, 0.5, 0.25)  # what the network below sees for each class, and for no class
WORSE = (-0.25, 0.0, 0.25, 0.0)
SCHEDULE = make_schedule("linear", 200, beta_end=0.05)  # of `settings_of`


def greys_of(config, greys, **changes) -> Weights:
  run = build_run(config, IMAGE_SHAPE, make_mesh("pmap"))
  run = run._replace(denoiser=Denoiser(says_grey, PARAMETERIZATIONS["eps"]))
  params = jax.device_put({"grey": np.asarray(greys, np.float32)}, run.mesh.replicated)
  return Weights(run, params, 5, "ema", "0" * 64, classes=NAMES)._replace(**changes)


def says_grey(params, xt, time, label):
  """The eps of a network for which every image of a class is of one grey."""
  a, b, _ = (value[:, None, None, None] for value in SCHEDULE.level(time + 1))
  return (xt - a * params["grey"][label][:, None, None, None]) / b


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = settings_of(tmp_path_factory.mktemp("classes"))
  return config_lib.override(config, CONDITIONAL | {"threshold": "none", "num_samples": 7})


@pytest.fixture(scope="module")
def greys(config) -> Weights:
  return greys_of(config, GREY, guide=greys_of(config, WORSE, identity="1" * 64))


@pytest.fixture
def quick(greys, config, tmp_path, monkeypatch) -> Trained:
  """A workdir from which `sample` draws images of one grey for each class."""

  def find(config, path):
    return greys if config.sample.guide_with else greys._replace(guide=None)

  monkeypatch.setattr(sampling, "find_weights", find)
  (tmp_path / "run").mkdir()
  return Trained(tmp_path / "run", config)


def byte(x: float) -> int:
  return round(min(max(127.5 * (x + 1), 0), 255))


def shades(images: np.ndarray) -> list:
  """Of images of one grey each, that grey."""
  assert (np.ptp(images.astype(int), axis=(-3, -2, -1)) <= 1).all()
  return images[..., 0, 0, 0].tolist()


def assert_shades(images, greys):
  np.testing.assert_allclose(shades(images), np.vectorize(byte)(greys), atol=1)


def test_all_classes_in_turn_or_those_that_are_named(quick):
  """Names or numbers, in the order in which they stand, as often as they stand; a row of the picture for each."""
  for named, turn in (((), [0, 1, 2]), (("flags", "0", "flags"), [2, 0, 2]), (("1",), [1])):
    sampling.sample(quick.having(classes=named), quick.path)
    archive = quick.load()
    assert archive["labels"].dtype == np.int32
    assert archive["labels"].tolist() == np.resize(turn, 7).tolist()
    assert_shades(archive["images"], np.take(GREY, archive["labels"]))
    assert quick.settings()["classes"] == list(named)
  sampling.sample(quick.having(classes=("flags", "0", "flags")), quick.path)
  picture = np.asarray(Image.open(quick.samples / "samples.png"))
  assert picture.shape[0] == 2 + 2 * 66 and picture.shape[1] > 2 + 5 * 66
  tiles = [picture[34 + 66 * row, picture.shape[1] - 5 * 66 + 32 :: 66, 0] for row in (0, 1)]
  np.testing.assert_allclose(tiles, [[byte(0.5)] * 5, [byte(-0.5)] * 2 + [255] * 3], atol=1)


@pytest.mark.parametrize(
  ("changes", "want"),
  [
    ({"guidance_scale": (1.0,)}, GREY),
    ({"guidance_scale": (0.0,)}, [0.25] * 3),
    ({"guidance_scale": (2.0,)}, [0.25 + 2 * (grey - 0.25) for grey in GREY]),
    (
      {"guidance_scale": (2.0,), "guide_with": "raw"},
      [bad + 2 * (good - bad) for good, bad in zip(GREY, WORSE, strict=True)],
    ),
    ({"guidance_scale": (2.0,), "guidance_interval": (0.009, 0.02)}, GREY),  # the level of t = 1, and of no step
    ({"guidance_scale": (2.0,), "threshold": "static"}, [-1, -0.25, 0.75]),  # after guidance
  ],
  ids=str,
)
def test_guidance(quick, changes, want):
  """g = 1 is off, 0 the guide, here the model that is not told the class; w of Ho and Salimans is g - 1."""
  sampling.sample(quick.having(**changes), quick.path)
  archive = quick.load()
  assert_shades(archive["images"], np.take(want, archive["labels"]))


@pytest.mark.parametrize(
  ("task", "changes"),
  [
    ("progressive", {}),
    ("slerp", {}),
    ("interpolate", {"interpolation_timestep": 200}),
    ("inpaint", {"sampler": "ddpm"}),
    ("reconstruct", {}),
  ],
)
def test_tasks(quick, monkeypatch, task, changes):
  """Rows are of the classes of the images that they begin with, where there are any; guided like a plain draw.

  What begins with images whose class nobody knows is told none.
  """
  own = np.array([2, 0, 0, 1, 1, 2], np.int32)
  source = from_array(pictures(), "own", own)
  monkeypatch.setattr(inputs, "open_source", lambda *_: source)
  options = changes | {"sample_task": task, "num_samples": 3, "guidance_scale": (1.5,), "guide_with": "raw"}
  given = {"interpolate": own[::2], "inpaint": own[:3], "reconstruct": own[:3]}.get(task, [0, 1, 2])
  guided = lambda label: WORSE[label] + 1.5 * (GREY[label] - WORSE[label])  # noqa: E731
  cases = [({}, given), ({"classes": ("flags", "dogs")}, [2, 1, 2])]
  for more, labels in cases:
    sampling.sample(quick.having(**options, **more), quick.path)
    images = quick.load(task)["images"]
    assert quick.load(task)["labels"].tolist() == list(labels)
    for row, label in zip(images, labels, strict=True):
      if task == "inpaint":
        drawn = quick.load(task)["mask"] > 0
        np.testing.assert_allclose(row[:, drawn], byte(guided(label)), atol=1)
      else:
        assert_shades(row, np.full(row.shape[:-3], guided(label)))


def test_classes_that_were_not_there_in_training_are_drawn_only_if_they_are_named(greys, config):
  """Those for which --num_classes leaves room; all, where no name is known."""
  more = config_lib.override(greys.run.config, {"num_classes": 5})
  roomy = greys._replace(run=greys.run._replace(config=more), guide=None)
  assert classes_lib.wanted(config.sample, roomy).turn.tolist() == [0, 1, 2]
  assert classes_lib.wanted(config.sample, roomy._replace(classes=())).turn.tolist() == [0, 1, 2, 3, 4]
  named = dataclasses.replace(config.sample, classes=("4", "flags"))
  assert classes_lib.wanted(named, roomy).turn.tolist() == [4, 2]


def test_images_of_no_class(greys, config):
  """Are told none, where the model knows that, and its guide; else a class must be named."""
  options, model = config.sample, greys.run.config.model
  assert classes_lib.of_given(options, greys, None).of(np.arange(2)).tolist() == [3, 3]
  without = greys._replace(
    run=greys.run._replace(config=config_lib.override(config, {"label_dropout": 0.0})), guide=None
  )
  assert model.label_dropout and without.run.null_label is None
  for known in (without, greys._replace(guide=without)):
    with pytest.raises(
      UserError, match="classes: the model draws by class, and the images have none; name it with --cl"
    ):
      classes_lib.of_given(options, known, None)
  assert classes_lib.of_given(dataclasses.replace(options, classes=("2",)), without, None).turn.tolist() == [2]


# With a network that is one.


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Name -> a workdir with checkpoints 3 and 5: conditional, the same without a null label, unconditional."""
  folder = tmp_path_factory.mktemp("by_class")
  kinds = {"conditional": CONDITIONAL, "without": CONDITIONAL | {"label_dropout": 0.0}, "plain": {}}
  return {name: make_workdir(folder / name, NAMES, **changes) for name, changes in kinds.items()}


def drawn(weights, config, labels, first=0, number=None, guide=None):
  """Images of these labels, from index `first` on, in one batch."""
  run = weights.run
  bind = bind_for_sampling(run, config.sample, guide and guide.run)
  table = table_of(config.sample, run.schedule, config.diffusion.variance)
  draw = make_draw(bind, table, first_stage=run.first_stage, mesh=run.mesh, stream="sample")
  scale = config.sample.guidance_scale[0]
  index = np.arange(first, first + len(labels), dtype=np.int32)
  constants = seeded(weights.params, 0, scale, guide and guide.params)
  return draw(constants, index, np.asarray(labels, np.int32), size=number or 8).astype(int)


def test_an_image_depends_on_its_label_and_its_index_alone(workdirs, monkeypatch):
  """Not on the labels of the others, nor on how many are drawn; guided, too, with both passes in one batch or two."""
  trained = workdirs["conditional"]
  weights = initial.find_weights(trained.config, trained.path)
  for scale in (1.0, 2.0):
    config = trained.having(guidance_scale=(scale,))
    whole = drawn(weights, config, [0, 1, 2, 0, 1])
    np.testing.assert_allclose(drawn(weights, config, [2, 1, 2, 2, 0])[1:3], whole[1:3], atol=1)
    np.testing.assert_allclose(drawn(weights, config, [2, 0], first=2, number=16), whole[2:4], atol=1)
    other = drawn(weights, config, [1, 2, 0, 1, 2])
    assert (np.abs(other - whole).mean((1, 2, 3)) > 1).all()  # the label matters
  monkeypatch.setattr(weights.run.mesh, "platform", "tpu")
  np.testing.assert_allclose(drawn(weights, config, [0, 1, 2, 0, 1]), whole, atol=1)


def test_what_a_scale_costs(workdirs, monkeypatch):
  """g = 1 is the unguided program; an interval leaves the second pass out; g = 0 is a draw without the class."""
  trained, rows = workdirs["conditional"], []
  weights = initial.find_weights(trained.config, trained.path)
  real = weights.run.denoiser.network

  def counted(params, xt, time, cond=None, *, dropout_keys=None):
    jax.debug.callback(lambda: rows.append(len(xt)))
    return real(params, xt, time, cond)

  run = weights.run._replace(denoiser=dataclasses.replace(weights.run.denoiser, network=counted))
  weights = weights._replace(run=run)
  table = table_of(trained.config.sample, run.schedule, "fixed_large")
  sigma = np.sqrt(1 / run.schedule.alpha_bar[table.t] - 1)
  middle = (float(sigma[2]) - 1e-3, float(sigma[1]) + 1e-3)  # of four evaluations the second and the third
  label = np.array([0, 2, 1], np.int32)

  def draw(scale, label=label, interval=()):
    options = trained.having(guidance_scale=(scale,), guidance_interval=interval if scale != 1.0 else ()).sample
    bind = bind_for_sampling(run, options)
    function = jax.jit(draw_lib.draw_of(bind, table, first_stage=run.first_stage, stream="sample"))
    del rows[:]
    params = jax.device_put(jax.tree.map(np.asarray, weights.params), jax.devices()[0])
    images = np.asarray(function(seeded(params, 0, scale), np.arange(3, dtype=np.int32), label))
    jax.effects_barrier()
    return images, sum(rows)

  plain, cost = draw(1.0)
  assert cost == 3 * 4
  assert draw(2.0)[1] == 3 * 8
  assert draw(2.0, interval=middle)[1] == 3 * (1 + 2 + 2 + 1)
  outside, cost = draw(2.0, interval=(1e3, 1e4))
  assert cost == 3 * 4
  np.testing.assert_array_equal(outside, plain)
  none, _ = draw(0.0)
  np.testing.assert_array_equal(none, draw(1.0, label=np.full(3, 3, np.int32))[0])
  assert (none != plain).any()
  monkeypatch.setattr(run.mesh, "platform", "tpu")
  assert draw(2.0)[1] == 3 * 8 and max(rows) == 6  # both passes in one batch


def test_a_guide_of_its_own(workdirs):
  """An earlier checkpoint, the raw weights, another workdir."""
  trained = workdirs["conditional"]
  seen = set()
  for text in ("3", "raw", str(workdirs["plain"].path)):
    config = trained.having(guidance_scale=(2.0,), guide_with=text)
    found = initial.find_weights(config, trained.path)
    assert found.guide is not None and found.guide.identity != found.identity
    seen.add(found.guide.identity)
    assert (found.guide.step, found.guide.which) == {"3": (3, "ema"), "raw": (5, "raw")}.get(text, (5, "ema"))
    assert found.guide.run.conditional == (text in ("3", "raw"))
  assert len(seen) == 3
  assert initial.find_weights(trained.config, trained.path).guide is None


def test_what_is_drawn_by_hand_with_a_guide(workdirs):
  """D = D_guide + g (D_main - D_guide) at every level, for a guide that is told the class and one that is not."""
  trained = workdirs["conditional"]
  level_of = initial.find_weights(trained.config, trained.path).run.schedule.level
  xt, label = np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE), np.float32), np.array([0, 2], np.int32)
  for text in ("3", str(workdirs["plain"].path)):
    config = trained.having(guidance_scale=(3.0,), guide_with=text, threshold="none")
    weights = initial.find_weights(config, trained.path)
    guide = weights.guide
    bind = bind_for_sampling(weights.run, config.sample, guide.run)
    level = level_of(90)
    found = bind(seeded(weights.params, 0, 3.0, guide.params), label)(xt, level).x0
    main = weights.run.denoiser.bind(weights.params, label)(xt, level).x0
    bad = guide.run.denoiser.bind(guide.params, label if text == "3" else None)(xt, level).x0
    np.testing.assert_allclose(found, bad + 3 * (main - bad), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_drawn(workdirs, tmp_path):
  """One line with the option, its value and what to do, before anything is drawn or written."""
  two = {"guidance_scale": (2.0,)}
  path = str(workdirs["conditional"].path)
  cases = [
    (
      "conditional",
      {"classes": ("flag",)},
      r"classes: 'flag' is none of the 3 classes of the model; did you mean flags",
    ),
    ("conditional", {"classes": ("3",)}, r"classes: '3' is none of the 3 .*; use some of cats, dogs, flags"),
    ("plain", {"classes": ("cats",)}, r"classes: cats has no effect, as the model is unconditional; .*--conditioning="),
    ("plain", two, r"guidance_scale: 2.0 has no effect, as the model is unconditional; use 1, or .*--guide_with"),
    ("without", two, r"guidance_scale: 2.0 has no effect, as the model was trained without --label_dropout; use 1, or"),
    ("conditional", {"guidance_scale": (1.0, 2.0)}, r"guidance_scale: 1.0,2.0 are several, which --mode=evaluate"),
    ("conditional", two | {"guide_with": "4"}, r"guide_with: 4: .*4"),
    (
      "conditional",
      two | {"guidance_interval": (1e3, 1e4)},
      r"guidance_interval: 1000.0,10000.0 holds none of the noise",
    ),
    ("conditional", two | {"guide_with": "5"}, r"guide_with: 5: it is the model itself, which cannot guide itself; "),
    ("conditional", two | {"guide_with": path}, r"guide_with: .*: it is the model itself"),
    (
      "conditional",
      two | {"guide_with": str(tmp_path / "none")},
      r"guide_with: there is no .*none; nothing is",
    ),
    (
      "plain",
      two | {"guide_with": path},
      r"guide_with: .*: its classes are cats, dogs, flags, those of the model none;",
    ),
  ]
  told = []
  for name, changes, pattern in cases:
    trained = workdirs[name]
    with pytest.raises(UserError) as caught:
      sampling.sample(trained.having(**changes), trained.path)
    told += [] if re.match(pattern, str(caught.value)) else [f"{changes}: {caught.value}"]
    assert "\n" not in str(caught.value)
  model = initial.find_weights(workdirs["conditional"].config, workdirs["conditional"].path)
  run, guide = model.run, model._replace(identity="0" * 64)
  large = dataclasses.replace(run.first_stage, image_shape=(16, 8, 1))
  for other, part in (
    (guide._replace(run=run._replace(schedule=make_schedule("cosine", 200))), "its noise schedule is not that of"),
    (guide._replace(run=run._replace(first_stage=large)), "it is of images of 16x8x1, the model of 8x8x1; name"),
    (guide._replace(classes=("a", "b")), "its classes are a, b, 2, those of the model cats, dogs, flags; name another"),
  ):
    with pytest.raises(UserError, match=part):
      initial.check_guide(model, other)
  initial.check_guide(model, guide)
  assert not told
  assert not any(trained.files() for trained in workdirs.values())


# In proportion.

COUNTS = np.array([500, 5, 250, 1, 244])
LABELS = np.repeat(np.arange(5, dtype=np.int32), COUNTS)
LETTERS = ("a", "b", "c", "d", "e")
PROPORTIONAL = classes_lib.Classes(LABELS, LETTERS, proportional=True)


def test_in_turn():
  classes = classes_lib.Classes(np.array([3, 1], np.int32), LETTERS)
  np.testing.assert_array_equal(classes.of(np.arange(5)), [3, 1, 3, 1, 3])


def test_in_proportion_by_the_golden_ratio():
  """As arithmetic with fifty digits has it."""
  getcontext().prec = 50
  golden = (1 + Decimal(5).sqrt()) / 2
  wanted = [LABELS[int(len(LABELS) * ((i + 1) / golden % 1))] for i in (*range(300), 49_999, 2**31 - 1)]
  index = np.array([*range(300), 49_999, 2**31 - 1], np.int32)
  np.testing.assert_array_equal(PROPORTIONAL.of(index), wanted)
  assert PROPORTIONAL.of(index).dtype == np.int32


def test_any_number_of_images_has_the_proportions():
  """For a Fibonacci number the inequality of Denjoy and Koksma: less than the variation of an interval, which is 2."""
  labels = PROPORTIONAL.of(np.arange(50_000))
  shares = COUNTS / COUNTS.sum()
  fibonacci = [1, 2]
  while fibonacci[-1] < 40_000:
    fibonacci.append(fibonacci[-1] + fibonacci[-2])
  for number in fibonacci:
    assert np.abs(np.bincount(labels[:number], minlength=5) - number * shares).max() < 2, number
  for number in (100, 1_000, 5_000, 10_000, 50_000):
    assert np.abs(np.bincount(labels[:number], minlength=5) - number * shares).max() < 4, number


def test_what_labels_depend_on_has_another_identity():
  in_turn = PROPORTIONAL._replace(proportional=False)
  assert len({PROPORTIONAL.identity, in_turn.identity, classes_lib.Classes(LABELS[1:], LETTERS).identity}) == 3
  assert PROPORTIONAL.identity == PROPORTIONAL._replace(names=LETTERS[::-1]).identity
