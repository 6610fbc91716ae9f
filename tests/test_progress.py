import io
import sys

import pytest

from ddpm_jax import progress as progress_lib
from ddpm_jax.progress import Progress, counted


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


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
  monkeypatch.setattr("ddpm_jax.console.columns", lambda: 0)
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
  """The speed is that since the first call; a line every ten seconds, and at the end."""
  with counted("image", total=100, quiet=False) as (done, say):
    say("drawing")
    clock[0] += 60  # a compilation
    done(20)  # what was there before
    for number in (30, 40, 50):
      clock[0] += 4
      done(number)
    clock[0] += 4
    done(60)
    clock[0] += 4
    done(100)
  out, err = capsys.readouterr()
  assert out.splitlines() == [
    "drawing",
    "image 20/100",
    "image 50/100  2.5 images/s  0:00:20 left",
    "image 100/100  4 images/s  0:00:00 left",
  ]
  assert err == ""


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
