"""The table against names and shapes that diffusers itself has written down, and against the layouts of both."""

import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.config import Config
from ddpm_jax.errors import UserError
from ddpm_jax.weights import names
from ddpm_jax.weights.options import model_settings
from tests.weights.folders import golden_json, state_of
from tests.weights.make_diffusers_golden import NETWORKS


def network(name):
  settings, shape = model_settings(golden_json(f"{name}/config"))
  return config_lib.override(Config(), settings).model, shape


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_and_shape_of_diffusers_and_no_other(name):
  rows = names.table(*network(name))
  found = {theirs: list(row.part_shape()) for row in rows for theirs in row.names}
  assert found == golden_json(f"{name}/shapes")
  assert {row.path for row in rows} == set(names.param_shapes(*network(name)))


@pytest.mark.parametrize("name", NETWORKS)
def test_in_and_out_is_every_bit(name):
  rows, state = names.table(*network(name)), state_of(name)
  params = names.from_diffusers(state, rows)
  back = names.to_diffusers(params, rows)
  assert set(back) == set(state)
  for key, tensor in state.items():
    np.testing.assert_array_equal(back[key].view(np.uint32), tensor.view(np.uint32))
  flat = names.to_flat(params)
  again = names.to_flat(names.from_flat(flat, *network(name)))
  assert set(again) == set(flat) and all(np.array_equal(again[key], flat[key]) for key in flat)


def test_layouts_by_hand():
  """An entry of each kind, found where the definitions of both sides put it."""
  state = state_of("attention_at_two_levels")
  params = names.from_diffusers(state, names.table(*network("attention_at_two_levels")))
  conv = state["down_blocks.1.downsamplers.0.conv.weight"]  # [out, in, height, width]
  assert params["down1_downsample"]["conv"]["kernel"][2, 0, 5, 7] == conv[7, 5, 2, 0]
  dense = state["time_embedding.linear_1.weight"]  # [out, in]
  assert params["temb_dense1"]["kernel"][3, 20] == dense[20, 3]
  shortcut = state["up_blocks.1.resnets.2.conv_shortcut.weight"]  # [out, in, 1, 1]
  assert params["up1_block2"]["shortcut"]["kernel"][9, 4] == shortcut[4, 9, 0, 0]
  qkv = params["up2_block1_attention"]["qkv"]  # of the smallest level, which is the first on the way up
  for i, part in enumerate(("to_q", "to_k", "to_v")):
    assert qkv["kernel"][1, 8 * i + 6] == state[f"up_blocks.0.attentions.1.{part}.weight"][6, 1]
    assert qkv["bias"][8 * i + 6] == state[f"up_blocks.0.attentions.1.{part}.bias"][6]
  assert params["mid_attention"]["norm"]["scale"][2] == state["mid_block.attentions.0.group_norm.weight"][2]


def test_older_names_are_read_and_never_written():
  rows = names.table(*network("attention_at_two_levels"))
  today = names.to_flat(names.from_diffusers(state_of("attention_at_two_levels"), rows))
  older = state_of("attention_at_two_levels", older=True)
  assert any(".query." in name for name in older) and not any(".to_q." in name for name in older)
  read = names.to_flat(names.from_diffusers(older, rows))
  assert set(read) == set(today) and all(np.array_equal(read[key], today[key]) for key in today)


def test_all_that_does_not_fit_is_named():
  rows, state = names.table(*network("one_level")), state_of("one_level")
  state["conv_in.weight"] = state["conv_in.weight"][:4]
  state["conv_out.bias"] = state["conv_out.bias"].reshape(1, 1)
  state["class_embedding.weight"] = np.zeros((10, 32), np.float32)  # of an unconditional network
  del state["mid_block.attentions.0.to_k.bias"]
  with pytest.raises(UserError) as caught:
    names.from_diffusers(state, rows)
  assert str(caught.value) == (
    "the weights do not fit the network: mid_block.attentions.0.to_k.bias is missing, class_embedding.weight is too "
    "much, conv_in.weight is [4, 1, 3, 3], not [8, 1, 3, 3], conv_out.bias is [1, 1], not [1]"
  )


def test_a_name_of_one_word_is_too_much():
  state = state_of("one_level") | {"step": np.zeros((), np.float32), "query": np.zeros((), np.float32)}
  with pytest.raises(UserError, match=r": step is too much, query is too much$"):
    names.from_diffusers(state, names.table(*network("one_level")))


def test_both_names_of_one_tensor_are_one_too_much():
  rows, state = names.table(*network("one_level")), state_of("one_level")
  state["mid_block.attentions.0.query.bias"] = state["mid_block.attentions.0.to_q.bias"]
  with pytest.raises(UserError, match=r": mid_block\.attentions\.0\.query\.bias is too much$"):
    names.from_diffusers(state, rows)


def test_our_names_are_stable():
  """Files that were written carry them."""
  flat = names.param_shapes(*network("attention_at_full_resolution"))
  assert {".".join(path): shape for path, shape in flat.items()}.items() >= {
    "conv_in.kernel": (3, 3, 1, 6),
    "temb_dense2.bias": (24,),
    "down0_block0_attention.qkv.kernel": (6, 18),
    "down0_downsample.conv.kernel": (3, 3, 6, 6),
    "mid_attention.proj.bias": (12,),
    "up1_block0.temb_proj.kernel": (24, 12),
    "up0_block1.shortcut.kernel": (12, 6),
    "norm_out.scale": (6,),
  }.items()
