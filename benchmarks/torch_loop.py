"""A worker's work: the same training as a plain PyTorch loop, with the U-Net of diffusers.

Needs torch and diffusers, and no JAX. What JAX does in the step is done here too: uint8 images to the device, flips,
timesteps, noise, the loss of eps, gradients, clipping, Adam, moving average of the weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

from benchmarks import hardware
from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError

VARIANTS = (
  *("eager", "channels_last", "compiled", "compiled channels_last"),
  *("channels_last 1 thread", "compiled channels_last 1 thread"),  # on a CPU
  *("channels_last in parts", "compiled channels_last in parts"),  # with --grad_accum_steps
)
_TRIALS, _TRIAL_SECONDS = 2, 3.0


def prepare(job: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str, int], dict[str, Any]]]:
  """Tries each variant and keeps the fastest.

  Args:
    job: `config`, as JSON; `image_shape`; `unet`: keyword arguments of UNet2DModel; `variants`: some of VARIANTS.

  Returns:
    Facts, and a function that makes updates.
  """
  try:
    torch: Any = importlib.import_module("torch")
    importlib.import_module("diffusers")
  except ModuleNotFoundError as error:
    raise UserError(
      f"torch_python: this Python has no {error.name}; pip install -e '.[benchmark]', or name one that has it"
    ) from error
  config = config_lib.from_json(job["config"])
  torch.manual_seed(config.train.seed)
  torch.backends.cudnn.benchmark = True
  if config.model.dtype == "float32":
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX does by default
  tried, steps = {}, {}
  for variant in job["variants"]:
    if "1 thread" in variant and torch.cuda.is_available():
      continue
    if "in parts" in variant and config.train.grad_accum_steps == 1:
      continue
    try:
      step = Step(torch, config, tuple(job["image_shape"]), job["unet"], variant)
      began = time.perf_counter()
      step.block(1)  # compiles, and lets cuDNN choose
      tried[variant] = {"first_two_seconds": time.perf_counter() - began, "images_per_second": 0.0}
      steps[variant] = step
    except RuntimeError as error:  # torch.compile has no compiler, or the device no memory
      tried[variant] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
  if not steps:
    raise UserError(f"no variant of PyTorch runs: {tried}")
  for _ in range(_TRIALS):
    for variant, step in steps.items():
      one = step.block(1)["seconds"]
      trial = step.block(max(1, round(_TRIAL_SECONDS / one)))
      tried[variant]["images_per_second"] = max(tried[variant]["images_per_second"], trial["images"] / trial["seconds"])
  best = max(steps, key=lambda variant: tried[variant]["images_per_second"])
  step = steps[best]
  steps.clear()
  facts = {
    "device": step.device_name,
    "threads": step.threads,
    "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
    "variant": best,
    "tried": tried,
    "versions": hardware.versions("torch", "diffusers"),
  }
  return facts, lambda case, count: step.block(count)


class Step:
  """Model, optimiser and moving average, and how an update is made."""

  def __init__(self, torch: Any, config: Config, shape: tuple[int, int, int], unet: dict[str, Any], variant: str):
    """Args: the module torch, the run, (H, W, C), keyword arguments of UNet2DModel, one of VARIANTS."""
    self._torch, self._config = torch, config
    self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    self.threads = 1 if "1 thread" in variant else hardware.cores()
    torch.set_num_threads(self.threads)
    self.device_name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
    model = importlib.import_module("diffusers").UNet2DModel(**unet).to(self.device)
    self._layout = torch.channels_last if "channels_last" in variant else torch.contiguous_format
    self.model = model.to(memory_format=self._layout)
    self._parameters = list(self.model.parameters())
    self._average = [copy.deepcopy(parameter).detach() for parameter in self._parameters]
    self._network = torch.compile(self.model) if "compiled" in variant else self.model
    rate = config.optimizer.learning_rate
    self._adam = torch.optim.Adam(self._parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    d = config.diffusion
    betas = torch.linspace(d.beta_start, d.beta_end, d.num_timesteps, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)  # the schedule does not change how long an update takes
    self._signal, self._noise = (table.float().to(self.device) for table in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    height, width, channels = shape
    size = (config.data.batch_size, channels, height, width)
    self._images = [torch.randint(0, 256, size, dtype=torch.uint8) for _ in range(8)]
    if self.device.type == "cuda":
      self._images = [images.pin_memory() for images in self._images]
    self._number = 0
    self._parts = config.train.grad_accum_steps if "in parts" in variant else 1

  def update(self) -> None:
    """One update with the next batch."""
    torch, config = self._torch, self._config
    batch = self._images[self._number % len(self._images)]
    self._number += 1
    x0 = batch.to(self.device, non_blocking=True).float() / 127.5 - 1
    if config.data.random_flip:
      x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=self.device) < 0.5, x0.flip(3), x0)
    x0 = x0.contiguous(memory_format=self._layout)
    t = torch.randint(0, config.diffusion.num_timesteps, (len(x0),), device=self.device)
    eps = torch.randn_like(x0)
    xt = self._signal[t][:, None, None, None] * x0 + self._noise[t][:, None, None, None] * eps
    self._adam.zero_grad(set_to_none=True)
    for part in zip(*(rows.chunk(self._parts) for rows in (xt, t, eps)), strict=True):
      with self._precision():
        output = self._network(part[0], part[1], return_dict=False)[0]
      loss = torch.nn.functional.mse_loss(output.float(), part[2])
      (loss / self._parts).backward()
    if config.optimizer.grad_clip:
      torch.nn.utils.clip_grad_norm_(self._parameters, config.optimizer.grad_clip)
    self._adam.step()
    with torch.no_grad():
      torch._foreach_lerp_(self._average, self._parameters, 1 - config.optimizer.ema_decay)

  def _precision(self) -> contextlib.AbstractContextManager:
    if self._config.model.dtype == "bfloat16":
      return self._torch.autocast(self.device.type, dtype=self._torch.bfloat16)
    return contextlib.nullcontext()

  def block(self, count: int) -> dict[str, Any]:
    """Makes updates, after one that is not timed."""
    wait = self._torch.cuda.synchronize if self.device.type == "cuda" else functools.partial(int)
    self._torch.set_num_threads(self.threads)
    self.update()
    wait()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
      self.update()
    wait()
    measured = {
      "seconds": time.perf_counter() - began,
      "cpu_seconds": time.process_time() - cpu,
      "images": count * self._config.data.batch_size,
    }
    if self.device.type == "cuda":
      measured["device_bytes"] = self._torch.cuda.max_memory_allocated()
    return {**measured, "process_bytes": hardware.peak_rss()}
