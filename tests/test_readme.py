"""The Python block of README.md runs and does what the text says."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_loop_prunes_unused_inputs():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  names = {}
  exec(compile(code, str(README), "exec"), names)
  kernels = [
    np.asarray(names["params"][layer]["kernel"])
    for layer in ("layers_0", "layers_2")
  ]
  for w in kernels:
    assert np.count_nonzero(w == 0) == int(0.7 * w.size)
  # Inputs 8 to 15 are always 0, so all of their weights are pruned first.
  assert not kernels[0][8:].any()
  assert float(names["loss"]) < 0.25 * float(np.var(names["y"]))
