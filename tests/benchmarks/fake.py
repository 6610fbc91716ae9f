"""Workers that compute nothing, and a clock that is theirs."""

import contextlib


class Machine:
  """How many times slower everything is at the moment; it drifts."""

  def __init__(self, drift=1.0):
    self.slow, self._drift, self.turns = 1.0, drift, []

  def run(self, name, rate, size=10):
    """A function that runs a block of a setting which makes `rate` images a second where nothing disturbs it."""

    def block(count):
      self.turns.append((name, count))
      self.slow *= self._drift
      seconds = count * size / rate * self.slow
      return {
        "seconds": seconds,
        "cpu_seconds": count * size / rate,
        "images": count * size,
        "steps": [seconds / count] * count,
        "process_bytes": 2**20,
      }

    return block


class Worker:
  """Answers as a worker does."""

  def __init__(self, facts, block):
    self._facts, self._block, self.jobs = facts, block, []

  def prepare(self, job):
    self.jobs.append(job)
    return self._facts

  def block(self, case, count):
    return self._block(count)


def workers(made):
  """Stands in for `command.workers`: the named workers, made before."""

  @contextlib.contextmanager
  def start(works, python=None):
    assert set(works) == set(made)
    yield made

  return start
