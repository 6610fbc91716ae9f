"""The same image files as a folder, a zip, tar shards and a parquet file, written without the package."""

import io
import json
import pathlib
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KINDS = ("folder", "zip", "webdataset", "parquet")


def encoded(pixels, suffix="png", **options) -> bytes:
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], **options)
  return stream.getvalue()


def pictures(number=14, size=8) -> dict[str, bytes]:
  """Files of random pixels by their name, sorted: most are colour, some grey, some JPEG, in three folders."""
  random, found = np.random.default_rng(0), {}
  for i in range(number):
    pixels = random.integers(0, 256, (size, size, 3), np.uint8)
    suffix = "jpg" if i % 5 == 1 else "png"
    found[f"{['ape', 'bee', 'cow'][i % 3]}/{i:02d}.{suffix}"] = encoded(
      pixels[..., 0] if i % 4 == 2 else pixels, suffix
    )
  return dict(sorted(found.items()))


def classes(files: dict[str, bytes]) -> tuple[list[str], list[int]]:
  """Names of the classes, and that of each file, by their folders."""
  names = sorted({name.partition("/")[0] for name in files})
  return names, [names.index(name.partition("/")[0]) for name in files]


def write_folder(root: pathlib.Path, files) -> pathlib.Path:
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return root


def write_zip(path: pathlib.Path, files, compression=zipfile.ZIP_DEFLATED) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def write_tar(path: pathlib.Path, members, form=tarfile.PAX_FORMAT) -> pathlib.Path:
  """members: (name, content) of each."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=form) as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return path


def examples(files, labels):
  """The members of a shard: each image, and its class in a .cls."""
  for (name, content), label in zip(files.items(), labels, strict=True):
    yield name, content
    if label is not None:
      yield f"{name.rpartition('.')[0]}.cls", str(label).encode()


def features(names, **more):
  """The metadata that the package `datasets` writes."""
  kinds = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}} | more
  return {"huggingface": json.dumps({"info": {"features": kinds}})}


def write_parquet(path: pathlib.Path, files, names, labels, **columns) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  images = [{"bytes": content, "path": name} for name, content in files.items()]
  table = pa.table({"image": images, "label": pa.array(labels, pa.int64()), **columns})
  pq.write_table(table.replace_schema_metadata(features(names)), path, row_group_size=3)
  return path


def write(kind: str, root: pathlib.Path, files: dict[str, bytes]) -> str:
  """Writes the files below `root`, labels and all. Returns the value of --dataset."""
  names, labels = classes(files)
  match kind:
    case "folder":
      return f"folder:{write_folder(root / 'folder', files)}"
    case "zip":
      return f"zip:{write_zip(root / 'x.zip', files)}"
    case "webdataset":
      members = list(examples(files, labels))
      half = len(members) // 4 * 2
      for number, part in enumerate((members[:half], members[half:])):
        write_tar(root / "shards" / f"x-{number:03d}.tar", part, [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT][number])
      (root / "shards" / "classes.json").write_text(json.dumps(names))
      return f"webdataset:{root}/shards/x-{{000..001}}.tar"
  return f"parquet:{write_parquet(root / 'x.parquet', files, names, labels)}"
