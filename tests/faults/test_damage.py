"""No bit of a checkpoint changes unnoticed, and no file of it can be missing: the run goes back to the older one."""

import random

import pytest

from tests.faults import damage

FLIPS = 25


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
  run = damage.SmallRun()
  directory = tmp_path_factory.mktemp("damage") / "checkpoints"
  damage.two_checkpoints(directory, run)
  judge = damage.Judge(directory, run)
  assert judge.judge() == "unharmed"
  return judge


def test_every_flipped_bit_is_found(judge):
  generator, newest = random.Random(0), judge.directory / str(judge.newer)
  judge.verdicts.clear()
  for _ in range(FLIPS):
    path, before = damage.random_flip(generator, newest)
    verdict = judge.judge()
    damage.put_back(path, before)
    assert verdict in ("fell back", "unharmed"), f"{path}: {verdict}"
  assert judge.verdicts["fell back"] > FLIPS / 4, judge.verdicts


def test_every_file_halved_emptied_zeroed_or_deleted(judge):
  newest = judge.directory / str(judge.newer)
  judge.verdicts.clear()
  for name, path, before in damage.strikes(newest):
    verdict = judge.judge()
    damage.put_back(path, before)
    assert verdict in ("fell back", "unharmed"), f"{path} {name}: {verdict}"
  assert judge.verdicts["fell back"] > 10, judge.verdicts


def test_the_whole_newest_checkpoint_emptied(judge, tmp_path):
  directory = damage.copied(judge.directory, tmp_path / "checkpoints")
  for path in damage.files(directory / str(judge.newer)):
    path.write_bytes(b"")
  other = damage.Judge.__new__(damage.Judge)
  other.__dict__.update(judge.__dict__ | {"directory": directory})
  assert other.judge() == "fell back"
