"""What goes wrong while an autoencoder trains, seen in its metrics: one line for each, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_LEAST_USED = 0.05  # share of the codes
_UNDECIDED, _PATIENCE = 0.02, 1000  # how near to 1 the hinge loss stays, for how many training steps
_COLLAPSED, _SETTLED = 0.01, 500  # nats for each latent number, after that many training steps


class Alarms:
  """Looks at the metrics of an autoencoder as they are logged; each alarm is raised once."""

  def __init__(self, discriminator_start: int):
    """`discriminator_start`: the option."""
    self._start = discriminator_start
    self._raised: set[str] = set()
    self._undecided_since: int | None = None

  def __call__(self, step: int, values: Mapping[str, float]) -> list[str]:
    """New alarms, from the metrics of training step `step`."""
    found = [(name, line) for name, line in self._look(step, values) if name not in self._raised]
    self._raised |= {name for name, _ in found}
    return [line for _, line in found]

  def _look(self, step: int, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    used = values.get("mean/codes_used", 1.0)
    if used < _LEAST_USED:
      yield (
        "codes",
        f"step {step}: {100 * used:.1f}% of the codes are in use, the codebook collapses; in a new run, use a smaller "
        "--codebook_size, fewer --latent_channels or a lower --learning_rate",
      )
    if values.get("mean/kl", 1.0) < _COLLAPSED and step >= _SETTLED:
      yield (
        "posterior",
        f"step {step}: the KL divergence is {values['mean/kl']:.2g} nats for each latent number, the latents hardly "
        "tell images apart; in a new run, use a lower --kl_weight",
      )
    undecided = step > self._start and abs(values.get("loss/discriminator", 0.0) - 1.0) < _UNDECIDED
    since = self._undecided_since = (self._undecided_since or step) if undecided else None
    if since is not None and step - since >= _PATIENCE:
      yield (
        "discriminator",
        f"step {step}: the discriminator's loss is at 1.0 since step {since}, it tells nothing apart; in a new run, "
        "use --adam_b1=0.5 --adam_b2=0.9, a later --discriminator_start with a --discriminator_warmup, or another "
        "--discriminator_layers",
      )
