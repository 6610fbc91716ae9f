# %% [markdown]
# # A trained model in Python
#
# Train one first, `python -m ddpm_jax.main --workdir=runs/digits`. Then open this file as a notebook, in VS Code as it
# is or elsewhere with jupytext, or run it from start to end, which makes one picture of all that it shows:
#
#     python experiments/notebook.py runs/digits notebook.png
"""What a trained model draws, sees in noise, and has between two noises."""

# %%
import itertools
import sys

import jax
import matplotlib.pyplot as plt
import numpy as np

import ddpm_jax
from ddpm_jax.diffusion.interpolation import slerp
from ddpm_jax.first_stage.pixels import to_float, to_uint8
from ddpm_jax.workdir import grids

given = [] if "ipykernel" in sys.modules else sys.argv[1:]
WORKDIR, PICTURE = [*given, *["runs/digits", "notebook.png"][len(given) :]]

# %% [markdown]
# ## Load
#
# A workdir, a folder of diffusers, or a safetensors file of `--mode=export`.

# %%
model = ddpm_jax.load(WORKDIR)
T = model.schedule.num_timesteps
print(model)
print(
  f"T {T}, schedule {model.config.diffusion.beta_schedule}, the network predicts {model.config.diffusion.prediction}"
)

# %% [markdown]
# ## Draw
#
# The images of `--mode=sample --sample_seed=0 --sampler=dpmpp --sampling_steps=20`, uint8 [N, H, W, C].

# %%
samples = model.sample(20, seed=0, sampler="dpmpp", steps=min(20, T))
print(samples.shape, samples.dtype, f"mean {samples.mean():.1f}")

# %% [markdown]
# ## What the network sees in noise
#
# One image, diffused to several t with the same noise (Ho et al. 2020, eq. 4), and the estimate of the image in each.
# With little noise it is the image, with much a mean of all images that could be in it. Near T nothing is left of the
# image but a share of sqrt(alpha_bar_t): the errors of eps_hat, divided by it, are all that x0_hat shows.

# %%
rng = np.random.default_rng(0)
times = np.unique(np.linspace(1, T, 9).round().astype(int))
x0 = np.asarray(to_float(samples[:1]))
eps = rng.standard_normal(x0.shape, np.float32)
a = model.schedule.sqrt_alpha_bar[times, None, None, None]
b = model.schedule.sqrt_one_minus_alpha_bar[times, None, None, None]
xt = a * x0 + b * eps
x0_hat = model.denoise(xt, times)
x0_error = np.sqrt(np.mean((x0_hat - x0) ** 2, axis=(1, 2, 3)))
eps_error = np.sqrt(np.mean((model.eps(xt, times) - eps) ** 2, axis=(1, 2, 3)))
for t, of_x0, of_eps in zip(times, x0_error, eps_error, strict=True):
  print(f"t {t:4d}  error of x0_hat {of_x0:.3f}  of eps_hat {of_eps:.3f}")

# %% [markdown]
# ## From noise to noise
#
# Deterministic DDIM (Song et al. 2021, eq. 12) by hand: x0_hat and eps_hat, put together with less noise. What it
# makes of noises on the way from one to another lies between two images.


# %%
def ddim(x, steps):
  """x_T [B, H, W, C] -> x_0, by model.denoise alone."""
  grid = np.linspace(T, 0, steps + 1).round().astype(int)
  a, b = model.schedule.sqrt_alpha_bar, model.schedule.sqrt_one_minus_alpha_bar
  for t, s in itertools.pairwise(grid):
    x0_hat = model.denoise(x, t)
    eps_hat = (x - a[t] * x0_hat) / b[t]
    x = a[s] * x0_hat + b[s] * eps_hat
  return x


ends = rng.standard_normal((2, 2, *model.image_shape), np.float32)  # two pairs
shares = np.linspace(0, 1, 9, dtype=np.float32)
way = jax.vmap(jax.vmap(slerp, (None, None, 0)), (0, 0, None))(ends[:, 0], ends[:, 1], shares)
between = ddim(np.asarray(way).reshape(-1, *model.image_shape), min(50, T))
between = np.asarray(to_uint8(between.astype(np.float32))).reshape(2, 9, *model.image_shape)

# %% [markdown]
# ## The picture

# %%
figure, axes = plt.subplots(4, 1, figsize=(8, 11), layout="constrained", height_ratios=(2, 2, 2.6, 2))
noised = np.stack([np.asarray(to_uint8(xt.astype(np.float32))), np.asarray(to_uint8(x0_hat))])
pictures = {
  "Drawn by DPM-Solver++": grids.image_grid(samples, columns=10),
  f"One of them at t = {', '.join(map(str, times))}, and x0_hat below": grids.image_rows(noised),
  "Between two noises, deterministic DDIM": grids.image_rows(between),
}
for panel, (title, picture) in zip(axes[[0, 1, 3]], pictures.items(), strict=True):
  panel.imshow(picture)
  panel.set_title(title, fontsize=10)
  panel.axis("off")
axes[2].plot(model.schedule.sqrt_alpha_bar, label="share of the image in x_t")
axes[2].plot(model.schedule.sqrt_one_minus_alpha_bar, label="deviation of the noise in x_t")
axes[2].plot(times, x0_error, "o-", label="error of x0_hat")
axes[2].set(xlabel="t", xlim=(0, T), ylim=(0, 1.25), title="The schedule, and what can be seen through the noise")
axes[2].title.set_fontsize(10)
axes[2].legend(fontsize=8, loc="upper center", ncols=3)
figure.savefig(PICTURE, dpi=100)
print(f"done: {PICTURE}")
