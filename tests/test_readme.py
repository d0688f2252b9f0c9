"""The README's Python runs as it stands and does what it says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

import folding
from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.serving.export import export
from folding.serving.predict import predict

README = pathlib.Path(__file__).parents[1] / "README.md"


def _blocks():
  return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_an_export_is_called_in_code_of_ones_own(tmp_path, monkeypatch):
  config = c.resolve(
    c.Config(
      task="classify",
      data=c.DataConfig(tokenizer="bytes", length=16),
      model=c.ModelConfig(num_layers=1, width=16, num_heads=2, causal=False),
    )
  )
  tokenizer = train_tokenizer(config.data, [])
  model = folding.make_model(config, tokenizer.vocab_size, num_classes=2)
  like = jnp.zeros((1, 16), jnp.int32)
  params = model.init(jax.random.key(0), like)["params"]
  params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 2))
  monkeypatch.chdir(tmp_path)
  export("small", config, params, tokenizer, labels=["bad", "good"])
  _, code = _blocks()
  names = {}
  exec(compile(code, str(README), "exec"), names)
  (found,) = predict(folding.load("small"), ["a text"])
  np.testing.assert_allclose(
    jax.nn.softmax(names["logits"][0]), found.probabilities, atol=1e-6
  )


def test_the_loop_prunes_what_is_unused():
  code, _ = _blocks()
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
