import contextlib
import io
import sys
import time

import pytest

from ddpm_jax.runtime import progress as progress_lib
from ddpm_jax.runtime.progress import Drawing, Progress, counted


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
  monkeypatch.setattr(progress_lib, "_shown", [])


def test_plain_lines_off_a_terminal(capsys):
  progress = Progress("step", total=110, done=10)
  progress.say("training")
  progress.advance()
  progress.report(10, {"loss": 0.123456, "grad norm": 2.0}, 4.0)
  progress.close()
  out, err = capsys.readouterr()
  assert out == "training\nstep 10/110  loss 0.1235  grad norm 2  4 steps/s  0:00:25 left\n"
  assert err == ""


@pytest.mark.parametrize(
  ("done", "rate", "left"),
  [(0, 1.0, "1:00:00"), (1800, 0.5, "1:00:00"), (3600, 3.0, "0:00:00"), (0, 0.01, "4 days, 4:00:00")],
)
def test_time_left(capsys, done, rate, left):
  Progress("step", total=3600).report(done, {}, rate)
  assert capsys.readouterr().out.endswith(f"steps/s  {left} left\n")


def test_an_unknown_speed_is_not_shown(capsys):
  Progress("step", total=10).report(1, {"loss": 0.5}, 0.0)
  assert capsys.readouterr().out == "step 1/10  loss 0.5\n"


def test_no_bar_on_a_terminal_without_size(capsys, monkeypatch):
  monkeypatch.setattr(sys, "stderr", Terminal())
  monkeypatch.setattr("ddpm_jax.runtime.console.columns", lambda: 0)
  Progress("step", total=10).report(1, {"loss": 0.5}, 3.0)
  assert capsys.readouterr().out == "step 1/10  loss 0.5  3 steps/s  0:00:03 left\n"


def test_a_pause_does_not_count_in_the_time_left(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  progress = Progress("step", total=110, done=10)
  before = progress._bar.start_t
  progress._bar.last_print_t -= 40  # forty seconds in which nothing advanced
  progress.unpause()
  assert progress._bar.start_t >= before + 40
  progress.close()


def test_quiet_says_nothing(capsys, monkeypatch):
  for stream in (sys.stderr, Terminal()):
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("step", total=10, quiet=True)
    progress.advance()
    progress.say("hello")
    progress.report(5, {"loss": 1.0}, 1.0)
    progress.close()
    assert capsys.readouterr() == ("", "")
  assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(capsys, monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  progress = Progress("step", total=110, done=10)
  progress.advance(50)
  progress.say("training")
  progress.report(60, {"loss": 0.123456}, 4.0)
  progress.close()
  drawn = terminal.getvalue()
  assert "10/110" in drawn
  assert "60/110" in drawn
  assert "loss 0.1235" in drawn
  assert drawn.endswith("\n")
  assert capsys.readouterr().out == "training\n"


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test moves."""
  now = [100.0]
  monkeypatch.setattr(progress_lib.time, "perf_counter", lambda: now[0])
  return now


def test_counting_off_a_terminal(capsys, clock):
  """The speed is that since the first call; lines at growing distances, and at the end."""
  with counted("image", total=1000, quiet=False) as (done, say):
    say("drawing")
    clock[0] += 60  # not known what for
    done(20)  # what was there before
    for number in range(30, 1001, 10):
      clock[0] += 4
      done(number)
  out, err = capsys.readouterr()
  assert out.splitlines() == [
    "drawing",
    "image 40/1000  2.5 images/s  0:06:24 left",  # after 8 seconds: the first call after 5
    "image 70/1000  2.5 images/s  0:06:12 left",  # after 20: 10 later
    "image 120/1000  2.5 images/s  0:05:52 left",
    "image 220/1000  2.5 images/s  0:05:12 left",
    "image 420/1000  2.5 images/s  0:03:52 left",
    "image 820/1000  2.5 images/s  0:01:12 left",
    "image 1000/1000  2.5 images/s  0:00:00 left",
  ]
  assert err == ""


def drawn(clock, evaluations=20):
  """Draws 10 images in batches of 6 and 4, each evaluation in 2 seconds."""
  with counted("image", total=10, quiet=False) as (done, _):
    for first, count in ((0, 6), (6, 4)):
      for made in range(evaluations + 1):
        at = Drawing(10, first, count, made, evaluations)
        done(at.images, str(at))
        clock[0] += 2


def test_drawing_is_said_in_images_and_network_evaluations(capsys, clock, monkeypatch):
  """Off a terminal with the speed and the time left; a bar says the same."""
  drawn(clock)
  assert capsys.readouterr().out.splitlines() == [
    "drawing: images 1 to 6 of 10, network evaluation 3/20  0.15 images/s  0:01:01 left",
    "drawing: images 1 to 6 of 10, network evaluation 8/20  0.15 images/s  0:00:51 left",
    "drawing: images 1 to 6 of 10, network evaluation 18/20  0.15 images/s  0:00:31 left",
    "drawing: images 7 to 10 of 10, network evaluation 17/20  0.124 images/s  0:00:05 left",
    "drawing: images 7 to 10 of 10, network evaluation 20/20  0.122 images/s  0:00:00 left",
  ]
  assert str(Drawing(64, 0, 64, 12, 20)) == "drawing: 64 images, network evaluation 12/20"
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  drawn(clock)
  bar = terminal.getvalue()
  assert "drawing: images 1 to 6 of 10, network evaluation 0/20 |" in bar and "evaluation/s" not in bar
  assert "drawing: images 7 to 10 of 10, network evaluation 20/20 |" in bar and "100%" in bar


def test_the_distance_of_lines_does_not_grow_for_ever(capsys, clock):
  with counted("image", total=10**6, quiet=False) as (done, _):
    for number in range(3000):
      clock[0] += 1
      done(number)
  numbers = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
  assert numbers == [5, 15, 35, 75, 155, 315, 615, 915, 1215, 1515, 1815, 2115, 2415, 2715]


def test_a_compilation_is_no_part_of_the_speed(capsys, clock):
  """Neither before the first call nor between two; nor are the lines closer together."""
  with counted("image", total=100, quiet=False) as (done, _):
    for number in range(0, 70, 10):
      with progress_lib.compiling():
        clock[0] += 60
      clock[0] += 4
      done(number)
  assert capsys.readouterr().out.splitlines() == [
    "image 20/100  2.5 images/s  0:00:32 left",
    "image 50/100  2.5 images/s  0:00:20 left",
  ]


def test_on_a_terminal_neither(monkeypatch):
  """Of a bar, whose clock is another, too: with an hour of compilation the time left would be days."""
  monkeypatch.setattr(sys, "stderr", Terminal())
  progress = Progress("step", total=110, done=10)
  progress._bar.start_t -= 3600
  progress._bar.last_print_t -= 3600
  progress.begin(15)
  assert progress._bar.n == progress._bar.initial == 15 and progress._bar.format_dict["elapsed"] < 60
  progress._bar.last_print_t -= 3600
  before = progress._bar.start_t
  with progress.compiling():
    pass
  assert progress._bar.start_t >= before + 3600
  progress.close()


def wait_until(condition):
  for _ in range(1000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError("in vain")


def test_a_compilation_is_said_off_a_terminal(capsys, monkeypatch):
  monkeypatch.setattr(progress_lib, "_COMPILING_S", 0.01)
  said = []
  monkeypatch.setattr(progress_lib.console, "say", said.append)
  with contextlib.closing(Progress("step", total=10)), progress_lib.compiling():
    wait_until(lambda: len(said) > 2)
  assert set(said) == {"compiling, 0 s"}
  number = len(said)
  with progress_lib.compiling():  # nothing is shown, so nothing is said
    time.sleep(0.1)
  with contextlib.closing(Progress("step", total=10, quiet=True)), progress_lib.compiling():
    time.sleep(0.1)
  assert len(said) == number
  monkeypatch.setattr(progress_lib, "_COMPILING_S", 20.0)
  with contextlib.closing(Progress("step", total=10)), progress_lib.compiling():
    time.sleep(0.05)
  assert len(said) == number, "one that is short is not worth a line"


def test_a_compilation_ticks_in_the_bar(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  monkeypatch.setattr(progress_lib, "_TICK_S", 0.01)
  with contextlib.closing(Progress("step", total=10)) as progress:
    with progress_lib.compiling():
      wait_until(lambda: terminal.getvalue().count("compiling, 0 s") > 2)
    progress.begin(5)
    assert "compiling" not in terminal.getvalue().rpartition("\r")[2]


def test_counting_at_once(capsys, clock):
  """All of it in one call: no speed is known."""
  with counted("image", total=8, quiet=False) as (done, _):
    done(8)
  assert capsys.readouterr().out == "image 8/8\n"


def test_counting_in_silence(capsys, clock):
  with counted("image", total=8, quiet=True) as (done, say):
    say("drawing")
    done(8)
  assert capsys.readouterr() == ("", "")


def test_counting_on_a_terminal(capsys, monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with counted("image", total=100, quiet=False) as (done, say):
    say("drawing")
    for number in (20, 60, 100):
      done(number)
  drawn = terminal.getvalue()
  assert "100/100" in drawn and "200/100" not in drawn and drawn.endswith("\n")
  assert capsys.readouterr().out == "drawing\n"


def test_the_bar_is_closed_when_counting_is_given_up(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)

  def give_up():
    with counted("image", total=100, quiet=False) as (done, _):
      done(20)
      raise OSError("no room")

  with pytest.raises(OSError, match="no room"):
    give_up()
  assert terminal.getvalue().endswith("\n") and "20/100" in terminal.getvalue()
