"""How long an evaluation takes, and what is chosen where nobody says how much: by a clock that the tests set."""

import json

import numpy as np
import pytest

from ddpm_jax.evaluation import estimate
from ddpm_jax.evaluation.estimate import Open, Speed, Work, as_before, choose, few_evaluations, left_open
from ddpm_jax.evaluation.features import Extracted, Features
from tests.evaluation.test_evaluate import LITTLE, pictures, weights_of
from tests.training.tiny import tiny_config

NONE = frozenset()
NOTHING = Open(False, False, False)
DPMPP = dict(sampler="dpmpp", sampling_steps=20)


def config_of(**changes):
  return tiny_config(**(LITTLE | dict(num_timesteps=100) | changes))


def opened(given=NONE, samples=True, likelihoods=True, **changes):
  return left_open(config_of(**changes), frozenset(given), samples=samples, likelihoods=likelihoods)


def test_what_is_left_open():
  """What a command or a workdir says is never chosen otherwise; so release 0.1, which kept 50,000, is as it was."""
  assert opened() == Open(True, True, True)
  assert opened(evaluate_samples=50_000) == NOTHING
  assert opened(likelihood_examples=7) == Open(True, True, False)
  assert opened(given={"likelihood_examples"}) == Open(True, True, False), "0 on the command line is all of them"
  for sampler in (dict(sampler="ddim"), dict(sampling_steps=100), dict(sampler="ddim", eta=0.5)):
    assert opened(**sampler) == Open(True, False, True)
  assert opened(given={"sampler"}) == opened(given={"sampling_steps"}) == Open(True, False, True)
  assert opened(samples=False) == Open(False, False, True)
  assert opened(likelihoods=False) == Open(True, True, False)


def result(number=2_000, examples=500, **sampler):
  drawn = {"number": number, "sampler": "dpmpp", "sampling_steps": 20, "eta": 0.0, **sampler}
  return {"samples": drawn, "bits_per_dim": {"train": {"examples": examples}, "test": {"examples": 90}}}


@pytest.mark.parametrize(
  ("changes", "earlier", "taken", "still"),
  [
    ({}, [], {}, Open(True, True, True)),
    (
      {},
      [result()],
      dict(evaluate_samples=2_000, likelihood_examples=500) | DPMPP,
      NOTHING,
    ),
    (
      {},
      [result(30), result(sampler="ddim")],
      dict(evaluate_samples=2_000, sampler="ddim", sampling_steps=20),
      NOTHING,
    ),
    ({}, [result(5_000), result(2_000)], dict(evaluate_samples=5_000) | DPMPP, NOTHING),
    ({}, [{"samples": result()["samples"]}], dict(evaluate_samples=2_000) | DPMPP, Open(False, False, True)),
    (DPMPP, [result()], dict(evaluate_samples=2_000), NOTHING),
    (dict(sampler="ddim"), [result()], dict(likelihood_examples=500, sampler="ddim"), Open(True, False, False)),
    (dict(evaluate_samples=64), [result()], dict(evaluate_samples=64, likelihood_examples=0), NOTHING),
    ({}, [{"samples": 3, "bits_per_dim": {"train": None}}, {"samples": {"number": "x"}}], {}, Open(True, True, True)),
  ],
)
def test_as_the_checkpoints_before(changes, earlier, taken, still):
  config = config_of(**changes)
  found, left = as_before(config, left_open(config, NONE, samples=True, likelihoods=True), earlier)
  assert left == still
  wanted = dict(evaluate_samples=0, sampler="ddpm", sampling_steps=0, likelihood_examples=0) | changes | taken
  if earlier and "likelihood_examples" not in taken and not still.likelihood_examples:
    wanted["likelihood_examples"] = 500
  assert found == config_of(**wanted)


def test_the_first_process_decides(monkeypatch):
  """The same settings on all, also where the others read another file or have another clock."""
  theirs = {"evaluate_samples": 5_000}

  def of_the_first(value):
    if value.dtype == np.uint8:
      return np.frombuffer(json.dumps(theirs).ljust(len(value)).encode(), np.uint8)[None]
    return np.asarray([[0.5, 0.25, 0.125]])

  monkeypatch.setattr(estimate, "all_gather_host", of_the_first)
  config = config_of()
  found, left = as_before(config, Open(True, True, False), [result(1_000)])
  assert (found.evaluate.evaluate_samples, left) == (5_000, NOTHING)
  monkeypatch.setattr(estimate, "_seconds_of_network", lambda *_: 9.0)
  features = Features("classifier", "", {}, lambda images: Extracted(images, images))
  assert estimate.measure_speed(config, weights_of(config), features, pictures()) == Speed(0.5, 0.25, 0.125)


def test_as_many_as_fit():
  config = few_evaluations(config_of(), Open(True, True, True))
  assert (config.sample.sampler, config.sample.sampling_steps) == ("dpmpp", 20)
  assert (
    few_evaluations(config_of(num_timesteps=30, sampling_steps=0), Open(True, False, True)).sample.sampler == "ddpm"
  )
  assert (
    few_evaluations(config_of(num_timesteps=20, bound_timesteps=0), Open(True, True, True)).sample.sampling_steps == 20
  )
  weights, left = weights_of(config), Open(True, True, True)
  likelihoods = [("bound", 600), ("bound", 100)]
  for seconds, samples, examples in (
    (1.0, 1_000, 100),  # too slow for anything: the least
    (400 / 2_000 / 20, 2_000, 100),  # 400 s of 600 are for the samples
    (400 / 4_999 / 20, 2_000, 200),  # 200 s are for the bound: 250 images of two splits at 100 timesteps
    (400 / 5_000 / 20, 5_000, 200),
    (1e-9, 50_000, 10_000),
  ):
    speed = Speed(seconds * (1 - 1e-9), seconds, 0.0)
    found = choose(config, weights, left, speed, Work(0, likelihoods), 600)
    assert (found.evaluate.evaluate_samples, found.evaluate.likelihood_examples) == (samples, examples), seconds
  kept = choose(config_of(evaluate_samples=64), weights, NOTHING, Speed(1.0, 1.0, 1.0), Work(0, likelihoods), 600)
  assert kept == config_of(evaluate_samples=64)


def test_what_is_told():
  config = config_of(evaluate_samples=2_000, likelihood_examples=250, sampler="dpmpp", sampling_steps=20, ode_steps=10)
  weights, speed = weights_of(config), Speed(0.01, 0.02, 0.001)
  work = Work(60_000, [("bound", 1_000), ("bound", 90)])
  found = estimate.estimate(config, weights, speed, work)
  assert found == pytest.approx((2_000 * 20 * 0.01, (2_000 + 60_000 + 2_000) * 0.001, (250 + 90) * 100 * 0.02))
  first, papers = estimate.lines(config, weights, speed, work)
  assert first == (
    "estimate, from a timed batch: about 19 min (drawing 2,000 images with 20 network evaluations each 7 min, features "
    "64 s, bound of 340 images 11 min)"
  )
  assert estimate.chosen_line(config, Open(True, True, True)).endswith(
    "for later checkpoints: --evaluate_samples=2000 --sampler=dpmpp --likelihood_examples=250 --sampling_steps=20"
  )
  assert "papers measure 50,000 images, drawn with all 100 steps, by Inception's features" in papers
  assert "takes about 13.9 h here: --evaluate_samples=50000 --sampler=ddpm --sampling_steps=100" in papers
  alone = estimate.lines(config, weights, speed._replace(features=0.0), Work(0, [("bound", 90), ("ode", 9)]))
  assert alone == ["estimate, from a timed batch: about 3 min (bound and ode of 99 images 3 min)"]
  as_papers = config_of(evaluate_samples=50_000, features="inception", inception_weights="x")
  assert len(estimate.lines(as_papers, weights, speed, work)) == 1
  assert [estimate.duration(seconds) for seconds in (0.1, 99, 101, 5_990, 6_100, 50 * 3600)] == [
    "1 s",
    "99 s",
    "2 min",
    "100 min",
    "1.7 h",
    "2.1 days",
  ]


def test_guidance_is_a_second_pass():
  """At every noise level of the sampler, or at those in the interval; none at a scale of 1."""

  def drawing(*scales, **changes):
    config = config_of(evaluate_samples=2_000, guidance_scale=scales, **(DPMPP | changes))
    weights = weights_of(config)
    text = estimate.lines(config, weights, Speed(0.01, 0.0, 0.001), Work(0, []))[0]
    left = Open(True, False, False)
    budget_s = 1.6 * 2_000 * 0.01 * len(scales) * 20
    still = config_of(guidance_scale=scales, **(DPMPP | changes))
    chosen = choose(still, weights, left, Speed(0.01, 0.0, 0.0), Work(0, []), budget_s)
    found = estimate.estimate(config, weights, Speed(0.01, 0.0, 0.001), Work(0, []))
    return round(found.drawing / 20), round(found.features), chosen.evaluate.evaluate_samples, text

  assert drawing(1.0)[:3] == (20, 4, 2_000)
  twice = drawing(2.0)
  assert twice[:3] == (40, 4, 1_000)
  assert "with 20 network evaluations each, 20 of them twice for guidance, 13 min" in twice[3]
  level = estimate.table_of(config_of(**DPMPP).sample, weights_of(config_of()).run.schedule, "fixed_large").level
  noise = np.sort(np.asarray(level.sigma) / np.asarray(level.alpha))
  inside = (float(noise[4]), float(noise[11]))  # the lower end is not, the upper one is
  some = drawing(2.0, guidance_interval=inside)
  assert some[0] == 20 + 7 and "7 of them twice" in some[3]
  config = config_of(evaluate_samples=2_000, guidance_scale=(1.0, 2.0), **DPMPP)
  by_classifier = estimate.estimate(config, weights_of(config), Speed(0.01, 0.0, 0.001, 0.03), Work(0, []))
  assert round(by_classifier.drawing / 20) == 20 + 40 + 2 * 60, "a gradient for each evaluation, in both passes one"
  swept = drawing(1.0, 2.0, 3.0)
  assert swept[:2] == (20 + 40 + 40, 8) and "2,000 images at each of 3 guidance scales with 20" in swept[3]


def test_a_batch_is_timed(monkeypatch):
  """By a clock that goes on by a second whenever it is looked at: an image of a batch of 128 on 8 devices."""
  ticks = iter(range(1_000))
  monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
  config = config_of(evaluate_batch_size=50)
  calls = []
  features = Features("classifier", "", {}, lambda images: calls.append(len(images)))
  found = estimate.measure_speed(config, weights_of(config), features, pictures(number=37))
  assert found == pytest.approx((1 / 3 / 128, 1 / 3 / 128, 1 / 3 / 50, 0.0)) and calls == [50] * 4
