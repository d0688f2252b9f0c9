"""The Python of README.md, and of the page on exports that it links to, runs."""

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

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
EXPORT = ROOT / "docs" / "how-to" / "export.md"


def test_readme_loop_prunes_unused_inputs():
  text, names = README.read_text(), {}
  (numbers,) = re.findall(r"^It prints `\S+ ({.*})`", text, re.M)
  (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
  exec(compile(code, str(README), "exec"), names)
  params = names["params"]
  found = folding.account(params, params)["parameters"]["overall"]
  assert str(found) == numbers
  kernels = [np.asarray(params[f"layers_{n}"]["kernel"]) for n in (0, 2)]
  for w in kernels:
    assert np.count_nonzero(w == 0) == int(0.7 * w.size)
  # Inputs 8 to 15 are always 0, so all of their weights are pruned first.
  assert not kernels[0][8:].any()
  assert float(names["loss"]) < 0.25 * float(np.var(names["y"]))


def test_logits_of_a_loaded_export_are_those_of_predict(tmp_path):
  config = c.resolve(
    c.Config(
      task="classify",
      data=c.DataConfig(tokenizer="bytes", length=16),
      model=c.ModelConfig(num_layers=1, width=16, num_heads=2, causal=False),
    )
  )
  tokenizer = train_tokenizer(config.data, [])
  model = folding.make_model(
    folding.shape_of(config), tokenizer.vocab_size, num_classes=2
  )
  tokens = jnp.zeros((1, 16), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 2))
  path = tmp_path / "small"
  made = folding.Model.of(config, params, tokenizer, ["bad", "good"])
  export(str(path), made)
  section = EXPORT.read_text().split("### In your own program")[1]
  code = re.search(r"```python\n(.*?)```", section, re.S)[1]
  names = {"jax": jax, "jnp": jnp, "loaded": folding.load(str(path))}
  exec(compile(code, str(EXPORT), "exec"), names)
  (found,) = predict(names["loaded"], ["I like it"])
  np.testing.assert_allclose(
    jax.nn.softmax(names["logits"][0]), found.probabilities, atol=1e-6
  )
