import io
import sys

import pytest

from ddpm_jax.progress import Progress


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
  monkeypatch.setattr("ddpm_jax.progress._columns", lambda: 0)
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
