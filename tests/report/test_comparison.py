"""Several runs on one page: the numbers of each, and only what can be compared in one column."""

import json
import re

import pytest

from ddpm_jax.config import Config, override, to_json
from ddpm_jax.errors import UserError
from ddpm_jax.report.comparison import write_comparison
from tests.report.test_report import NASTY, Page, bound, evaluate, metrics, picture, samples


def make(path, rows=(), grids=(), **changes):
  """A workdir with lines of metrics and sample grids of these steps."""
  path.mkdir(parents=True)
  (path / "config.json").write_text(to_json(override(Config(), {"num_steps": 40} | changes)))
  if rows:
    metrics(path, rows)
  for step in grids:
    picture(path / f"samples/step_{step:08d}.png")
  return path


def lines(steps, loss, batch=64, seconds=0.1):
  return [{"step": step, "loss": loss / step, "images": step * batch, "seconds": step * seconds} for step in steps]


def old_lines(steps, loss, speed):
  return [{"step": step, "loss": loss / step, "steps_per_second": speed, "images_per_second": speed} for step in steps]


def page_of(folder, *runs) -> Page:
  write_comparison(runs, folder / "page.html")
  return Page(folder / "page.html")


def rows_of(page, heading) -> list[list[str]]:
  """The table after a heading."""
  table = page.source.partition(f"<h2>{heading}</h2>")[2].partition("<table>")[2].partition("</table>")[0]
  rows = re.findall(r"<tr.*?</tr>", table)
  return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_curves_over_steps_images_and_time(tmp_path):
  """A run of release 0.1.0 beside a new one: its images and seconds follow from batch and speed."""
  new = make(tmp_path / "new", lines((10, 20), 5.0), batch_size=64)
  old = make(tmp_path / "old", old_lines((10, 30), 9.0, speed=4.0), batch_size=32)
  page = page_of(tmp_path, new, old)
  charts = page.charts()
  for title, first, last in (
    ("Loss over training steps", "0.9 at 10", "0.3 at 30 training steps"),
    ("Loss over images", "0.9 at 320", "0.3 at 960 images seen"),
    ("Loss over seconds of training", "0.9 at 2.5", "0.3 at 7.5 seconds"),
  ):
    assert charts[title] == f"{title}: {first}, {last}"
  assert page.source.count("fill: none; stroke: var(--c1)") == page.source.count("fill: none; stroke: var(--c2)") == 3
  assert rows_of(page, "Runs")[1:] == [
    ["new", "20 of 40", "1,280", "2 s", "", "0.25"],
    ["old", "30 of 40", "960", "8 s", "4", "0.3"],
  ]
  assert "cannot be compared" not in page.text and "script" not in page.source
  other = page_of(tmp_path, new, make(tmp_path / "v", lines((10,), 1.0), prediction="v"))
  assert "The runs differ in prediction: their losses are of different things, and cannot be compared." in other.text


def test_losses_of_other_stages_and_their_likelihoods_are_set_apart(tmp_path):
  """Latents of two autoencoders are other numbers; so are the sums of two autoencoders' terms."""
  a, b, again = (
    make(tmp_path / name, lines((10, 20), 5.0), first_stage=f"/runs/{name}", image_size=8) for name in ("a", "b", "c")
  )
  for workdir, digest, total in ((a, "1", 1.5), (b, "2", -3.0), (again, "1", 1.4)):
    (workdir / "first_stage").mkdir()
    network = {"regularizer": "kl", "codebook_size": 0, "latent_channels": 2, "channel_multipliers": [1, 2]}
    facts = {"image_shape": [8, 8, 1], "network": network, "sha256": digest, "data": str(workdir)}
    (workdir / "first_stage/settings.json").write_text(json.dumps(facts))
    bound = {"train": {"total": total, "standard_error": 0.1, "examples": 9, "first_stage": {"sha256": digest}}}
    (workdir / "eval").mkdir()
    (workdir / "eval/20.json").write_text(json.dumps({"step": 20, "weights": "ema", "latent_bits_per_dim": bound}))
  assert "differ in first_stage: their losses" in page_of(tmp_path, a, b).text
  assert "cannot be compared" not in page_of(tmp_path, a, again).text
  for others, measured in ((b, 2), (again, 1)):
    head = rows_of(page_of(tmp_path, a, others), "Measures")[0]
    assert sum("Latent bits/dim" in cell for cell in head) == measured, head
  changes = {"d": dict(discriminator_weight=0.5), "e": dict(regularizer="vq")}
  made = (make(tmp_path / name, lines((10,), 1.0), stage="autoencoder", **of) for name, of in changes.items())
  text = page_of(tmp_path, *made).text
  assert "differ in regularizer, discriminator_weight: their losses" in text


def test_grids_of_the_latest_step_that_all_have(tmp_path):
  a, b, c = (make(tmp_path / name, grids=steps) for name, steps in (("a", (5, 10, 15)), ("b", (5, 10)), ("c", ())))
  page = page_of(tmp_path, a, b)
  assert "At step 10, the latest at which all have one." in page.text
  assert [image["alt"] for image in page.all("img")] == ["Sample grid of a", "Sample grid of b"]
  assert page.text.count(", step 10") == 2 and "15" not in page.text
  page = page_of(tmp_path, a, b, c)
  assert "The latest of each run, as there is no step at which all have one." in page.text
  assert "a, step 15" in page.text and "b, step 10" in page.text and len(page.all("img")) == 2
  (a / "samples" / "step_00000010.png").write_text("no picture")
  page = page_of(tmp_path, a, b)
  assert "a: samples/step_00000010.png: left out, as it is no picture" in page.text and len(page.all("img")) == 1


def test_only_what_was_measured_alike_shares_a_column(tmp_path):
  a, b = make(tmp_path / "a"), make(tmp_path / "b", dataset="fashion_mnist")
  alike, fewer = samples(classifier_distance=3.0), samples(classifier_distance=1.0)
  fewer["samples"]["number"] = 500
  elsewhere = samples(classifier_distance=2.0)
  elsewhere["reference"]["sha256"] = "f" * 64
  evaluate(a, 10, **alike, bits_per_dim={"train": bound(3.7)})
  evaluate(a, 20, **samples(classifier_distance=2.5))
  evaluate(b, 10, **samples(classifier_distance=2.25), bits_per_dim={"train": bound(3.5)})
  evaluate(b, 20, **fewer)
  evaluate(b, 30, **elsewhere)
  page = page_of(tmp_path, a, b)
  head, *rows = rows_of(page, "Measures")
  assert [cell.partition("\N{NO-BREAK SPACE}↓")[0] for cell in head] == [
    "Run",
    "Step",
    *["Classifier distance"] * 3,
    *["Bits/dim"] * 2,
  ]
  assert "samples number 1000" in head[2] and "samples number 500" in head[3]
  assert "data dataset digits" in head[5] and "data dataset fashion_mnist" in head[6], "bounds of other images"
  assert f"reference sha256 {'f' * 24}" in head[4] and "no reference sha256" in head[2]
  numbers = [[cell.partition(" ")[0] for cell in row] for row in rows]
  assert numbers == [
    ["a", "10", "3.000", "", "", "3.700", ""],
    ["a", "20", "2.500", "", "", "", ""],
    ["b", "10", "2.250", "", "", "", "3.500"],
    ["b", "20", "", "1.000", "", "", ""],
    ["b", "30", "", "", "2.000", "", ""],
  ]
  assert page.best[0] == "2.250", "of the one column with several"


def test_settings_that_differ(tmp_path):
  a, b = make(tmp_path / "a", batch_size=64), make(tmp_path / "b", batch_size=128, channel_multipliers=(1, 2, 4))
  head, *rows = rows_of(page_of(tmp_path, a, b), "Settings")
  assert head == ["Setting", "a", "b"]
  assert [row[0].split()[0] for row in rows] == ["batch_size", "channel_multipliers"]
  assert rows[0][1:] == ["64", "128"] and rows[1][2] == "1,2,4"
  same = page_of(tmp_path, a, make(tmp_path / "c", batch_size=64))
  assert "The runs have the same settings." in same.text


def test_runs_of_one_name_and_nasty_ones(tmp_path):
  runs = [make(tmp_path / sweep / "run", lines((10,), 1.0), dataset=NASTY) for sweep in ("one", "two")]
  with (runs[0] / "metrics.jsonl").open("a") as file:
    file.write("no line\n")
  page = page_of(tmp_path, *runs)
  assert "one/run, two/run" in page.text
  assert "one/run: metrics.jsonl has damaged lines, which are left out: 1." in page.text
  many = [make(tmp_path / f"run {i} <b>", lines((10, 20), i + 1.0)) for i in range(10)]
  page = page_of(tmp_path, *many)
  assert {f"c{i}" for i in range(1, 9)} <= set(re.findall(r"stroke: var\(--(c\d)\)", page.source)) and "<b>" not in (
    page.source.replace("<b>Loss", "").replace("<b>Notes", "")
  )
  assert write_comparison(many, tmp_path / "again.html") is None
  assert (tmp_path / "again.html").read_bytes() == (tmp_path / "page.html").read_bytes()


def test_what_is_no_run_is_one_line(tmp_path):
  run = make(tmp_path / "run")
  (tmp_path / "empty").mkdir()
  (tmp_path / "odd").mkdir()
  (tmp_path / "odd" / "config.json").write_text("{")
  (tmp_path / "link").symlink_to(run)
  for runs, out, message in (
    ([run], "page.html", "RUN: name the workdirs of two runs or more"),
    ([run, tmp_path / "none"], "page.html", "RUN: there is no folder .*/none; name the workdir of a run"),
    ([run, run / "config.json"], "page.html", r"RUN: there is no folder .*/config\.json"),
    ([run, tmp_path / "empty"], "page.html", r"RUN: .*/empty is no workdir \(there is no config\.json\)"),
    ([run, tmp_path / "odd"], "page.html", r"RUN: .*/odd is no workdir \(the settings cannot be read: .*not JSON"),
    ([run, tmp_path / "link"], "page.html", "RUN: one workdir is named twice"),
    ([run, make(tmp_path / "other")], "none/page.html", "out: cannot write .* \\(No such file or directory\\)"),
  ):
    with pytest.raises(UserError, match=f"^{message}") as caught:
      write_comparison(runs, tmp_path / out)
    assert "\n" not in str(caught.value)
  assert not (tmp_path / "page.html").exists()
