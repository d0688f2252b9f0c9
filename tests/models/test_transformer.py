import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as config_lib
from folding import paths
from folding.models import transformer
from folding.models.shape import shape_of
from tests.models import oracle

KEY = jax.random.key(0, impl="rbg")  # compiles faster than threefry
N, D, H, K, F, V, C, L, B = 2, 16, 4, 4, 24, 11, 3, 6, 2


def _make(build=config_lib.ModelConfig, task="lm", fold=None, **fields):
  """Returns a tiny model and its resolved config."""
  shape = {"num_layers": N, "width": D, "num_heads": H, "mlp_width": F}
  config = config_lib.resolve(
    config_lib.Config(
      task=task,
      preset="none",
      data=config_lib.DataConfig(length=L),
      model=build(**(shape | fields)),
      fold=config_lib.FoldConfig(**(fold or {})),
    )
  )
  return transformer.make_model(shape_of(config), V, C), config


def _tokens(seed=0, batch=B, length=L):
  tokens = np.random.default_rng(seed).integers(0, V, (batch, length))
  return jnp.asarray(tokens, jnp.int32)


def _shapes(model):
  return jax.eval_shape(model.init, jax.random.key(0), _tokens())["params"]


def _randomized(model):
  """Returns parameters none of which has a value that hides it."""
  leaves, tree = jax.tree.flatten(_shapes(model))
  rng = np.random.default_rng(0)
  values = [np.float32(0.5 * rng.normal(size=x.shape)) for x in leaves]
  return jax.tree.unflatten(tree, list(map(jnp.asarray, values)))


gpt2, bert, llama = config_lib.gpt2, config_lib.bert, config_lib.llama
IRC1 = {"groups": 1, "values": "diagonal"}
MODELS = {
  "gpt2": (gpt2, "lm", {}, {}),
  "gpt2_folded": (gpt2, "lm", IRC1, {}),
  "gpt2_blocks_classify": (gpt2, "classify", {"values": "diagonal"}, {}),
  # Dropout is off where nothing else is asked for.
  "bert": (bert, "classify", {}, {"dropout": 0.5}),
  "bert_folded": (bert, "classify", IRC1, {"pooling": "mean"}),
  "bert_input_rows": (
    bert,
    "classify",
    {"groups": 2, "axis": "input", "values": "diagonal"},
    {},
  ),
  "llama": (llama, "lm", {}, {"num_kv_heads": 2}),
  "llama_folded": (llama, "lm", {"groups": 2, "values": "diagonal"}, {}),
  "llama_input_row": (
    llama,
    "classify",
    {"groups": 1, "axis": "input"},
    {"num_kv_heads": 1, "tie_embeddings": True},
  ),
  "default_folded": (
    config_lib.ModelConfig,
    "lm",
    IRC1 | {"values": ("dense", "diagonal")},
    {"activation": "relu"},
  ),
  "no_biases": (
    config_lib.ModelConfig,
    "lm",
    IRC1,
    {"use_bias": False, "gated": True, "tie_embeddings": False},
  ),
}
each_model = pytest.mark.parametrize(
  ("build", "task", "fold", "fields"), MODELS.values(), ids=MODELS
)
KEEP = jnp.asarray(np.arange(L) < np.array([[L], [4]]))


@each_model
def test_forward_pass_equals_the_oracle(build, task, fold, fields):
  model, config = _make(build, task, fold, **fields)
  params = _randomized(model)
  logits = jax.jit(model.apply)({"params": params}, _tokens(), KEEP)
  assert logits.dtype == jnp.float32
  # float32 through two layers of weights of 0.5: rounding of about 1e-6.
  np.testing.assert_allclose(
    logits, oracle.Model(config, params)(_tokens(), KEEP), rtol=2e-5, atol=5e-5
  )


def test_mean_over_no_tokens_is_zero():
  model, _ = _make(bert, "classify", pooling="mean")
  params = _randomized(model)
  logits = jax.jit(model.apply)(
    {"params": params}, _tokens(), KEEP.at[1].set(False)
  )
  np.testing.assert_array_equal(logits[1], params["head"]["bias"])


@pytest.mark.parametrize(
  ("build", "fold", "fields"),
  [
    (llama, IRC1, {}),
    (config_lib.ModelConfig, {}, {"norm_position": "post"}),
  ],
  ids=["llama_folded", "alibi_post_norm"],
)
def test_logits_have_zero_gradient_to_later_tokens(build, fold, fields):
  model, _ = _make(build, "lm", fold, **fields, tie_embeddings=False)
  params, tokens = _randomized(model), jnp.arange(L, dtype=jnp.int32)[None]

  def summed(embedding):  # token i is row i, so rows are positions
    changed = params | {"embed": {"embedding": embedding}}
    return model.apply({"params": changed}, tokens)[0].sum(-1)

  jacobian = jax.jit(jax.jacrev(summed))(params["embed"]["embedding"])
  reach = np.abs(jacobian).max(-1)[:, :L]
  past = np.tril(np.ones((L, L), bool))
  assert (reach[past] > 0).all()
  np.testing.assert_array_equal(reach[~past], 0)


def _loss(model, params, tokens, **options):
  logits = model.apply({"params": params}, tokens, **options)
  return (logits**2).mean()


def test_remat_gives_the_same_gradients():
  def gradients(remat):
    model, _ = _make(fold=IRC1, num_layers=1, remat=remat, dropout=0.5)
    options = {"deterministic": False, "rngs": {"dropout": KEY}}
    gradient = jax.grad(lambda p: _loss(model, p, _tokens(), **options))
    return jax.jit(gradient)(_randomized(model))

  plain, remat = gradients(False), gradients(True)
  largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(plain))
  assert largest > 0
  # The same operations, fused differently.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-6 * largest
    ),
    remat,
    plain,
  )


def test_scanned_layers_equal_the_others():
  options = {"fold": IRC1, "num_layers": 3, "mlp_width": (9, 9, 5)}

  def run(**fields):
    model, _ = _make(**options, **fields)

    def loss(params):
      x, stored = model.apply(
        {"params": params},
        _tokens(),
        KEEP,
        method="encode",
        capture_intermediates=True,
      )
      return (x**2).mean(), stored

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = gradient.lower(params := _randomized(model))
    loops = lowered.as_text().count("stablehlo.while")
    return loops, lowered.compile()(params)

  no_loops, plain = run()
  loops, scanned = run(scan_layers=True, remat=True)
  assert (no_loops, loops) == (0, 2)  # of the first two layers, both passes
  # The same sums, fused differently.
  chex.assert_trees_all_close(scanned, plain, rtol=1e-4, atol=1e-5)


def test_scanned_layers_have_dropout_of_their_own():
  model, _ = _make(scan_layers=True, dropout=0.5)
  params = _randomized(model)
  # The same weights in both layers, and nothing left of the input.
  params["blocks_1"] = params["blocks_0"]

  @jax.jit
  def branches(params):
    _, stored = model.apply(
      {"params": params},
      _tokens(),
      deterministic=False,
      rngs={"dropout": KEY},
      capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    return [stored["intermediates"][f"blocks_{n}"]["dropout"] for n in range(N)]

  dropped = [
    [np.asarray(x) == 0 for x in layer["__call__"]]
    for layer in branches(params)
  ]
  assert all(0.3 < x.mean() < 0.7 for layer in dropped for x in layer)
  assert all((a != b).any() for a, b in zip(*dropped, strict=True))


def test_remat_keeps_less_for_the_backward_pass():
  def kept_bytes(remat):
    model, _ = _make(remat=remat)
    backward = jax.eval_shape(
      lambda p: jax.vjp(lambda p: _loss(model, p, _tokens()), p)[1],
      _shapes(model),
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))

  assert kept_bytes(True) < 0.6 * kept_bytes(False)


def test_dropout_masks_the_embedding_and_both_branches():
  model, _ = _make(dropout=0.25)

  @jax.jit
  def inputs_and_outputs(params):
    dropped = []

    def record(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if isinstance(context.module, nn.Dropout):
        dropped.append((args[0], out))
      return out

    rngs = {"dropout": KEY}
    with nn.intercept_methods(record):
      model.apply({"params": params}, _tokens(0, 64), None, False, rngs=rngs)
    return dropped

  dropped = jax.device_get(inputs_and_outputs(_randomized(model)))
  assert len(dropped) == 1 + 2 * N
  masks = [out != 0 for _, out in dropped]
  for (x, out), kept in zip(dropped, masks, strict=True):
    np.testing.assert_allclose(out[kept], x[kept] / 0.75, rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=0.03)  # of 6144 draws
  for a in range(len(masks)):
    for b in range(a):  # two independent masks agree on 0.75^2 + 0.25^2
      assert (masks[a] == masks[b]).mean() == pytest.approx(0.625, abs=0.03)


def test_bfloat16_computes_near_float32_and_stores_float32():
  exact, _ = _make(fold=IRC1, num_layers=1)
  model, _ = _make(fold=IRC1, num_layers=1, dtype="bfloat16")
  shapes = jax.tree.leaves(_shapes(model))
  assert {x.dtype for x in shapes} == {jnp.dtype("float32")}
  params = {"params": _randomized(exact)}
  expected = jax.jit(exact.apply)(params, _tokens())
  logits, state = jax.jit(model.apply, static_argnames="capture_intermediates")(
    params, _tokens(), capture_intermediates=True
  )
  assert logits.dtype == jnp.float32
  seen = paths.flatten(state["intermediates"])
  assert {x.dtype for name, x in seen.items() if name.startswith("bl")} == {
    jnp.dtype("bfloat16")
  }
  error = np.abs(logits - expected).max() / np.abs(expected).max()
  assert 0 < error < 0.03  # a few roundings of 2^-8


BLOCK = [
  *("norm_attn/scale", "norm_attn/bias", "norm_mlp/scale", "norm_mlp/bias"),
  *("mlp/up/kernel", "mlp/up/bias", "mlp/down/kernel", "mlp/down/bias"),
  *("attn/q/kernel", "attn/q/bias", "attn/k/kernel", "attn/k/bias"),
  *("attn/o/kernel", "attn/o/bias"),
]
DENSE_V, FOLDED_V = ["attn/v/kernel", "attn/v/bias"], ["attn/v/diagonal"]
EMBED = ["embed/embedding", "position_embed/embedding"]
LLAMA_BLOCK = [
  *("norm_attn/scale", "norm_mlp/scale", "mlp/gate/kernel", "mlp/up/kernel"),
  *("mlp/down/kernel", "attn/q/kernel", "attn/k/kernel", "attn/v/kernel"),
  "attn/o/kernel",
]


@pytest.mark.parametrize(
  ("build", "task", "fold", "outside", "blocks"),
  [
    (
      gpt2,
      "lm",
      IRC1 | {"values": ("dense", "diagonal")},
      [*EMBED, "norm_final/scale", "norm_final/bias"],
      [BLOCK + DENSE_V, BLOCK + FOLDED_V],
    ),
    (
      bert,
      "classify",
      {},
      [*EMBED, "norm_embed/scale", "norm_embed/bias"]
      + ["head/kernel", "head/bias"],
      [BLOCK + DENSE_V] * 2,
    ),
    (
      llama,
      "lm",
      {},
      ["embed/embedding", "norm_final/scale", "head/kernel"],
      [LLAMA_BLOCK] * 2,
    ),
    (
      config_lib.ModelConfig,
      "lm",
      IRC1,
      ["embed/embedding", "norm_final/scale", "norm_final/bias"],
      [BLOCK + FOLDED_V + ["attn/log_slopes"]] * 2,
    ),
  ],
  ids=["gpt2_dense_then_diagonal", "bert", "llama", "alibi_folded"],
)
def test_parameter_paths_are_a_contract(build, task, fold, outside, blocks):
  model, _ = _make(build, task, fold)
  expected = outside + [
    f"blocks_{n}/{name}" for n, names in enumerate(blocks) for name in names
  ]
  assert sorted(paths.flatten(_shapes(model))) == sorted(expected)


def test_initial_scales_and_nearly_uniform_prediction():
  model, _ = _make(width=64, num_heads=4, mlp_width=256)
  params = jax.jit(model.init)(KEY, _tokens())
  spread = {
    name.removeprefix("params/"): float(np.std(x))
    for name, x in paths.flatten(params).items()
  }
  # The residual branches are smaller by sqrt(2 N); 4096 draws give 1%.
  expected = {
    "embed/embedding": 0.02,
    "blocks_0/attn/q/kernel": 64**-0.5,
    "blocks_0/attn/o/kernel": 64**-0.5 / 2,
    "blocks_1/mlp/up/kernel": 64**-0.5,
    "blocks_1/mlp/down/kernel": 256**-0.5 / 2,
  }
  assert {n: spread[n] for n in expected} == pytest.approx(expected, rel=0.1)
  logits = np.asarray(jax.jit(model.apply)(params, _tokens()))
  nats = np.log(np.exp(logits).sum(-1)) - logits.mean(-1)  # of any token
  assert nats.mean() == pytest.approx(math.log(V), abs=0.1)


def test_sequence_longer_than_learned_positions_is_refused():
  model, _ = _make(gpt2)
  params = {"params": _randomized(model)}
  tokens = _tokens(0, B, L + 1)
  with pytest.raises(ValueError, match="6 learned positions"):
    model.apply(params, tokens)


def test_relative_positions_accept_longer_sequences():
  model, config = _make()
  params, tokens = _randomized(model), _tokens(0, B, 2 * L)
  expected = oracle.Model(config, params)(tokens, np.ones((B, 2 * L), bool))
  logits = jax.jit(model.apply)({"params": params}, tokens)
  np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=5e-5)


def test_unit_of_a_zero_vector_is_zero_with_a_finite_gradient():
  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(x_BD):
    unit_BD = transformer.unit(x_BD)
    return unit_BD.sum(), unit_BD

  gradient, unit_BD = run(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
  np.testing.assert_allclose(unit_BD, [[0, 0], [0.6, 0.8]])
  assert np.isfinite(gradient).all()
