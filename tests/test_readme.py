"""The README's Python runs as it stands and does what it says."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_loop_prunes_what_is_unused():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  names = {}
  exec(compile(code, str(README), "exec"), names)
  kernels = [
    np.asarray(names["params"][layer]["kernel"])
    for layer in ("layers_0", "layers_2")
  ]
  for w in kernels:
    assert np.count_nonzero(w == 0) == int(0.7 * w.size)
  # Inputs 8 to 15 are always 0: their weights go first, and all of them.
  assert not kernels[0][8:].any()
  assert float(names["loss"]) < 0.25 * float(np.var(names["y"]))
