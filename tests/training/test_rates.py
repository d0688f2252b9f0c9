import dataclasses

import numpy as np

from folding import config as c
from folding import paths
from tests.training import tiny


def test_folded_projections_and_slopes_have_rates_of_their_own():
  config = tiny.config(
    fold=c.FoldConfig(groups=(0, 1), v_block=(1, 0)),
    model=c.ModelConfig(num_layers=2, width=32, num_heads=4),
    train=c.TrainConfig(qk_rate=0.25, v_rate=4.0, slope_rate=8.0, warmup=0.0),
  )
  plain = c.TrainConfig(qk_rate=1.0, v_rate=1.0, slope_rate=1.0, warmup=0.0)
  params = tiny.noise(tiny.shapes(config))

  def second_update(config):
    tx = tiny.make(config).tx
    _, state = tx.update(tiny.noise(params, 1), tx.init(params), params)
    updates, _ = tx.update(tiny.noise(params, 2), state, params)
    return paths.flatten(updates)

  updates = second_update(config)
  without = second_update(dataclasses.replace(config, train=plain))
  changed = {
    **dict.fromkeys(
      ["blocks_0/attn/log_slopes", "blocks_1/attn/log_slopes"], 8
    ),
    "blocks_0/attn/v/diagonal": 4,
    **{
      f"blocks_1/attn/{q}/{part}": 0.25
      for q in "qk"
      for part in ("kernel", "bias")
    },
  }
  assert changed.keys() <= updates.keys()
  for name, update in updates.items():
    assert np.any(update != 0), name
    # Powers of two, so exact.
    np.testing.assert_array_equal(
      update, changed.get(name, 1) * without[name], err_msg=name
    )
