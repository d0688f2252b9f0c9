"""Sliding windows, as config.json says which layers have one."""

import pytest

from folding.models import hf_config
from tests.models.checkpoints import FAMILIES, N


@pytest.mark.parametrize(
  ("options", "window"),
  [
    ({}, None),
    ({"sliding_window": 5}, None),
    ({"use_sliding_window": True}, None),  # 28 layers before the first window
    ({"use_sliding_window": True, "max_window_layers": N}, None),
    ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    (
      {
        **{"use_sliding_window": True, "sliding_window": 5},
        "layer_types": ["sliding_attention"] * N,
      },
      5,
    ),
  ],
)
def test_windows_of_qwen2(options, window):
  described = hf_config.describe(FAMILIES["qwen2"] | options)
  assert described.config.window == window


@pytest.mark.parametrize("window", [None, 7, 4096])
def test_windows_of_mistral(window):
  values = FAMILIES["mistral"] | {"sliding_window": window}
  if window == 4096:
    del values["sliding_window"]
  assert hf_config.describe(values).config.window == window


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("window", [None, 7])
def test_a_mistral_has_its_window_whatever_its_layers_are_called(kind, window):
  # transformers does not look at the kinds there.
  values = FAMILIES["mistral"] | {"sliding_window": window}
  described = hf_config.describe(values | {"layer_types": [kind] * N})
  assert described.config.window == window


def test_a_llama_has_no_window_whatever_it_says():
  values = FAMILIES["llama"] | {"sliding_window": 4}
  described = hf_config.describe(values | {"use_sliding_window": True})
  assert described.config.window is None
