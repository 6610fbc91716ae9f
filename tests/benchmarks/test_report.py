import json

import pytest

from benchmarks import report
from benchmarks.alternate import Block, Spread
from ddpm_jax.errors import UserError


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (1234567, "1,230,000"),
    (123.4, "123"),
    (12.34, "12.3"),
    (0.12345, "0.123"),
    (-0.98765, "-0.988"),
    (99.96, "100.0"),
  ],
)
def test_numbers_have_three_digits(value, text):
  assert report.number(value) == text


def test_spread_is_scaled():
  assert report.with_spread(Spread(0.001, 0.002, 0.0041), 1e3) == "2.00 (1.00 to 4.10)"


def test_columns_are_aligned():
  lines = report.table(["what", "A", "B"], [["speed", "1.5", "22"], ["time", "100", "3"]]).splitlines()
  assert lines == ["what        A   B", "-----------------", "speed     1.5  22", "time      100   3"]


def test_a_table_is_never_too_wide():
  text = report.table(["x", "y"], [["a" * 200, "b" * 40]])
  assert max(map(len, text.splitlines())) == report.WIDTH
  assert "…  " + "b" * 40 in text


def test_headings_are_broken_between_words():
  lines = report.heading("A: " + "--flag=value " * 20).splitlines()
  assert max(map(len, lines)) <= report.WIDTH
  assert "".join(lines).count("--flag=value") == 20
  assert lines[1].startswith("   --flag=value")


def test_the_document_has_every_measurement_and_no_name_of_the_machine(tmp_path):
  import platform

  blocks = [Block(0, "A", 3, {"seconds": 1.5, "images": 12}), Block(0, "B", 3, {"seconds": 3.0, "images": 12})]
  content = report.document("x", {"A": {"flags": ("--dtype=bfloat16",)}}, {"A": {}}, blocks, {"A": Spread(1, 2, 3)})
  report.write_json(str(tmp_path / "out.json"), content)
  text = (tmp_path / "out.json").read_text()
  read = json.loads(text)
  assert read["measurements"][1] == {
    "round": 0, "setting": "B", "count": 3, "measured": {"seconds": 3.0, "images": 12}
  }  # fmt: skip
  assert read["settings"]["A"]["flags"] == ["--dtype=bfloat16"]
  assert read["results"]["A"] == [1, 2, 3]
  assert read["machine"]["cores"] >= 1
  assert read["machine"]["load"] >= 0
  assert f"{read['machine']['cores']} cores; load in the last minute " in report.machine()
  assert read["date"].endswith("+00:00")
  assert platform.node() not in text.replace("localhost", "") or not platform.node()


def test_a_file_that_cannot_be_written_is_known_before(tmp_path):
  report.check_writable("")
  report.check_writable(str(tmp_path / "out.json"))
  with pytest.raises(UserError, match=r"json: the folder of .* does not exist"):
    report.check_writable(str(tmp_path / "nowhere" / "out.json"))
  with pytest.raises(UserError, match="json: cannot write"):
    report.write_json(str(tmp_path), {})
  report.write_json("", {"nothing": object()})
