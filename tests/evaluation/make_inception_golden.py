"""Makes inception_golden.npz with the reference implementations, and the random weights that it is for.

  pip install torch numpy pillow requests
  pip install --no-deps torchvision pytorch-fid clean-fid
  python -m tests.evaluation.make_inception_golden

The tests import only what needs none of these.
"""

from __future__ import annotations

import hashlib
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).with_name("inception_golden.npz")
LINES = (1, 5, 32, 298, 299, 331, 640)  # pixels in a line; resized to 299
PICTURES = ((23, 40), (350, 301))  # height and width
END_TO_END = (20, 26)  # height and width
POSITIONS = 16


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A float32 tensor as a function of its name, with which the activations neither grow nor vanish."""
  noise = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1.0, 1.0, shape)
  match name.rsplit(".", 1)[-1], len(shape):
    case "weight", 4:
      tensor = noise * np.sqrt(1.8 / np.prod(shape[1:]))
    case "weight", 2:
      tensor = noise * 0.1
    case "weight", 1:
      tensor = 1.0 + 0.25 * noise
    case "running_var", _:
      tensor = 0.4 + 0.3 * noise
    case _:
      tensor = 0.25 * noise
  return tensor.astype(np.float32)


def random_images(number: int, height: int, width: int, channels: int = 3) -> np.ndarray:
  """uint8 [number, height, width, channels], as a function of the shape."""
  shape = (number, height, width, channels)
  return np.random.default_rng(shape).integers(0, 256, shape, np.uint8)


def network_input() -> np.ndarray:
  """float32 [2, 299, 299, 3] in [-1, 1]: coarse squares, as finer noise averages out; the second one is dark."""
  small = random_images(2, 23, 23).astype(np.float32) / 127.5 - 1.0
  small[1] = 0.25 * small[1] - 0.75
  return small.repeat(13, axis=1).repeat(13, axis=2)


def summary(name: str, activation: np.ndarray) -> np.ndarray:
  """float32 [2, 2 + POSITIONS]: of each of two examples mean, standard deviation, and values at fixed positions.

  activation: [2, ...], channels last.
  """
  rows = activation.reshape(2, -1).astype(np.float64)
  positions = np.random.default_rng(zlib.crc32(name.encode())).integers(0, rows.shape[1], POSITIONS)
  return np.column_stack([rows.mean(1), rows.std(1), rows[:, positions]]).astype(np.float32)


def pixels_at(name: str, pictures: np.ndarray) -> np.ndarray:
  """64 values at fixed positions."""
  return pictures.reshape(-1)[np.random.default_rng(zlib.crc32(name.encode())).integers(0, pictures.size, 64)]


def _references() -> tuple:
  """pytorch-fid's network, clean-fid's resizing and clean-fid's scaling, as modules."""
  import torch

  # Operators that torchvision declares without its compiled part. The library keeps them as long as it lives.
  library = torch.library.Library("torchvision", "FRAGMENT")
  for operator in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, operator):
      library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  from cleanfid import inception_torchscript, resize
  from pytorch_fid import inception

  return inception, resize, inception_torchscript, library


def use_random_weights(inception) -> dict[str, np.ndarray]:
  """Lets pytorch-fid load random weights instead of its own; returns them."""
  import torch

  # The blocks that pytorch-fid patches have the parameters of torchvision's.
  plain = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None).state_dict()
  tensors = {name: random_tensor(name, tuple(t.shape)) for name, t in plain.items() if t.dtype == torch.float32}
  state = {name: torch.from_numpy(tensors[name]) if name in tensors else t for name, t in plain.items()}
  inception.load_state_dict_from_url = lambda *_, **__: state
  return tensors


def network_golden(inception, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Every block of pytorch-fid's network, in float64; and its own path from pixels, in float32."""
  import torch

  golden = {"weights": np.frombuffer(tensors_sha256(tensors).encode(), np.uint8)}
  network = inception.fid_inception_v3().eval().double()
  for name, module in network.named_children():
    if name.startswith(("Conv2d_", "Mixed_")):

      def keep(module, inputs, output, name=name):
        golden[f"block/{name}"] = summary(name, output.permute(0, 2, 3, 1).numpy())

      module.register_forward_hook(keep)
    elif name == "avgpool":
      module.register_forward_hook(lambda m, i, output: golden.update(features=output.flatten(1).float().numpy()))
  with torch.no_grad():
    golden["logits"] = network(torch.from_numpy(network_input()).double().permute(0, 3, 1, 2)).float().numpy()
    pixels = torch.from_numpy(random_images(1, *END_TO_END)).permute(0, 3, 1, 2).float() / 255.0
    (features,) = inception.InceptionV3().eval()(pixels)
  golden["end_to_end/features"] = features.flatten(1).numpy()
  golden["end_to_end/probabilities"] = (
    (features.flatten(1) @ torch.from_numpy(tensors["fc.weight"]).T).softmax(dim=1).numpy()
  )
  return golden


def tensors_sha256(tensors: dict[str, np.ndarray]) -> str:
  """Over names and bytes: whether the random weights are still those that the golden numbers are for."""
  return hashlib.sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def resize_golden(inception, resize, inception_torchscript) -> dict[str, np.ndarray]:
  """What both references give their networks: lines of pixels whole, pictures at fixed positions."""
  import torch

  wrapper = inception.InceptionV3((0,))
  scale = inception_torchscript.InceptionV3W.__new__(inception_torchscript.InceptionV3W)
  torch.nn.Module.__init__(scale)
  scale.resize_inside = False
  seen = []

  class Layers:
    def forward(self, x):
      seen.append(x.numpy())
      return torch.zeros(len(x), 2048)

  scale.layers = Layers()
  wrapper.blocks = torch.nn.ModuleList([torch.nn.Identity()])
  clean = resize.build_resizer("clean")

  def both(picture: np.ndarray) -> dict[str, np.ndarray]:
    (fid,) = wrapper(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255.0)
    scale(torch.from_numpy(clean(picture).transpose(2, 0, 1))[None])
    return {"fid": fid.numpy()[0].transpose(1, 2, 0), "clean": seen.pop()[0].transpose(1, 2, 0)}

  golden = {}
  for size in LINES:
    line = random_images(1, size, 1)[0]
    golden |= {f"{mode}/line/{size}": result[:, 0, 0] for mode, result in both(line).items()}
  for height, width in PICTURES:
    name = f"{height}x{width}"
    golden |= {f"{m}/picture/{name}": pixels_at(name, r) for m, r in both(random_images(1, height, width)[0]).items()}
  return golden


def main() -> None:
  inception, resize, inception_torchscript, _library = _references()
  tensors = use_random_weights(inception)
  golden = resize_golden(inception, resize, inception_torchscript) | network_golden(inception, tensors)
  np.savez_compressed(GOLDEN, **golden)
  for name, array in golden.items():
    print(name, array.shape, array.dtype, array.reshape(-1)[:2] if name.startswith("block") else "")
  print(GOLDEN.stat().st_size, "bytes")


if __name__ == "__main__":
  main()
