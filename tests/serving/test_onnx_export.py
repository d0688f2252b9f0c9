"""ONNX programs: the same numbers in onnxruntime as here."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import folding
from folding import config as c
from folding.errors import ConfigError
from folding.models import sentence
from folding.serving import export as export_lib
from folding.serving import generate, onnx_export
from tests.models import checkpoints
from tests.serving import models

_BERT = c.bert(**models.SHAPE, pooler=True)
_GPT2 = c.gpt2(**models.SHAPE, pooling="last")
_LLAMA = c.llama(**models.SHAPE | {"width": 32}, num_kv_heads=2)


def _shrunk(shape, task="classify", **fold):
  """Returns a model without some neurons, tokens and heads."""
  model = models.make(task, shape, c.FoldConfig(**fold))
  model = models.with_zeros(model, [7, 9, 10])
  model.params["blocks_1"]["attn"]["o"]["kernel"][1:3] = 0
  small = export_lib.shrunk(model)
  assert small.config.model.heads == ((0, 1, 2, 3), (0, 3))
  return small


# Together they have every form of the arrays, and every option of the graph.
_CASES = {
  # Post-norm, first token, pooler, relative bias; ranks below the whole, fewer heads in a layer, a token map.
  "bert-low-rank": lambda: _shrunk(
    dataclasses.replace(_BERT, relative_buckets=32),
    groups=2,
    values="dense",
    value_rank=(2, 3),
    embedding_rank=5,
  ),
  # Tokens and positions of one low rank.
  "bert-one-rank": lambda: models.make(
    model=_BERT,
    fold=c.FoldConfig(
      groups=0, values="dense", embedding_rank=5, embedding_shared=True
    ),
  ),
  "deberta": lambda: models.make(
    model=dataclasses.replace(_BERT, embed_width=5, project_first=True),
    fold=c.FoldConfig(groups=0, values="dense"),
  ),
  # Projected embeddings, ALiBi, pre-norm, mean over tokens, a pooler with a norm;
  # the identity for W_V.
  "alibi-identity": lambda: _shrunk(
    c.ModelConfig(
      **models.SHAPE,
      causal=False,
      embed_width=12,
      embed_norm=True,
      pooler=True,
      pooler_norm=True,
    ),
    groups=1,
    embedding_rank=5,
  ),
  # Norms of queries and keys.
  "last-by-input-axis": lambda: models.make(
    model=dataclasses.replace(
      _GPT2, qk_norm=True, norm_epsilon=0.1, num_kv_heads=2
    ),
    fold=c.FoldConfig(groups=4, axis="input", values="dense"),
  ),
  "gpt2-diagonal": lambda: models.make("lm", _GPT2, c.FoldConfig(groups=2)),
  # RMSNorm, gates, no biases, shared keys and values, a window; RoPE by copies,
  # norms after branches.
  "llama-window": lambda: models.make(
    "lm",
    dataclasses.replace(
      _LLAMA,
      window=(5, 0),
      rope_base=(100.0, 1e4),
      norm_position="both",
      scale_embeddings=True,
    ),
    c.FoldConfig(groups=2, values="dense", value_rank=3),
  ),
  # RoPE by pairs in half of the channels, parallel branches, capped logits; a
  # layer with values per query head beside shared keys.
  "llama-pairs": lambda: models.make(
    "lm",
    dataclasses.replace(
      _LLAMA, rope_share=0.5, parallel=True, attention_cap=1.0, logit_cap=2.0
    ),
    c.FoldConfig(groups=4, rope="pairs", values=("dense", "diagonal")),
  ),
  # A layer without some heads has a smaller cache.
  "alibi-window": lambda: _shrunk(
    c.ModelConfig(**models.SHAPE, window=(0, 5)), "lm", groups=1
  ),
}
_DECODERS = ["gpt2-diagonal", "llama-window", "llama-pairs", "alibi-window"]


@pytest.fixture(scope="module")
def start():
  """Returns a function that starts onnxruntime on an exported folder."""
  runtime = pytest.importorskip("onnxruntime", reason="needs the extra `onnx`")

  def session(folder):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    # Without VNNI, x86 would clip sums of int8 products.
    options.add_session_config_entry("session.x64quantprecision", "1")
    made = runtime.InferenceSession(
      str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    def run(*inputs, past=None):
      """Returns the outputs; a language model has those of its cache, too."""
      feed = [x.astype(np.int64) for x in inputs]
      caches = made.get_inputs()[len(inputs) :]
      if past is None:
        past = [
          np.zeros((len(feed[0]), x.shape[1], 0, x.shape[3]), np.float32)
          for x in caches
        ]
      names = [x.name for x in made.get_inputs()]
      return made.run(None, dict(zip(names, feed + past, strict=True)))

    return run

  return session


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """Returns a function that makes a case once: its model and exported folder."""

  @functools.cache
  def export(name):
    model, folder = _CASES[name](), tmp_path_factory.mktemp(name) / "out"
    onnx_export.export_onnx(folder, model)
    return model, folder

  return export


@functools.cache
def _generator(module):
  return generate.Generator(module)


@pytest.fixture(scope="module")
def openvino():
  # Outside of CI its import is reported to its makers, by a fork, which JAX warns of.
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("CI", "true")
    return pytest.importorskip("openvino", reason="needs the extra `parity`")


def _batch(num_tokens, length=17):
  """Returns ids of three texts, and a mask with padding at the end."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, num_tokens, (3, length))
  return tokens, np.arange(length) < np.array([[length], [2], [length - 1]])


def _logits(model, tokens, mask):
  tokens = getattr(model.tokenizer, "token_map", np.arange(21))[tokens]
  apply = models.jitted(model.module)
  return np.asarray(apply({"params": model.params}, tokens, mask))


@pytest.mark.parametrize("name", _CASES)
def test_program_computes_the_model_in_any_shape(start, exported, name):
  model, folder = exported(name)
  run = start(folder)
  tokens, mask = _batch(model.tokenizer.plain_size)
  expected = _logits(model, tokens, mask)
  found, *_ = run(tokens, mask)
  assert found.shape == expected.shape
  if not model.labels:
    found, expected = found[mask], expected[mask]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
  # Each text by itself, without padding, and so in other shapes.
  for row in range(3):
    keep = mask[row]
    one, *_ = run(tokens[row : row + 1, keep], mask[row : row + 1, keep])
    rest = expected[row] if model.labels else expected[mask[:row].sum() :]
    np.testing.assert_allclose(
      one[0], rest[: len(one[0])], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", _CASES)
def test_openvino_computes_the_program(openvino, exported, name):
  model, folder = exported(name)
  read = openvino.Core().compile_model(
    folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
  )
  tokens, mask = _batch(model.tokenizer.plain_size)
  inputs = {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}
  for x in read.inputs[2:]:
    _, heads, _, size = x.partial_shape
    shape = (len(tokens), heads.get_length(), 0, size.get_length())
    inputs[x.any_name] = np.zeros(shape, np.float32)
  found, expected = read(inputs)["logits"], _logits(model, tokens, mask)
  if not model.labels:
    found, expected = found[mask], expected[mask]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", _DECODERS)
def test_cache_continues_padded_prompts(start, exported, name, side):
  model, folder = exported(name)
  run = start(folder)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, model.num_rows, size) for size in (9, 1, 6)]
  tokens, start_B = generate.pad_left(prompts, 9)
  if side == "right":
    tokens = np.stack(list(map(np.roll, tokens, -start_B)))
  at, size = np.arange(9), 9 - start_B[:, None]
  mask = at >= 9 - size if side == "left" else at < size
  # In two pieces.
  first, *past = run(tokens[:, :4], mask[:, :4])
  second, *past = run(tokens[:, 4:], mask, past=past)
  last = -1 if side == "left" else size[:, 0] - 1
  logits_BV = np.concatenate([first, second], axis=1)[range(3), last]
  found = []
  for _ in range(7):
    found.append(logits_BV)
    mask = np.pad(mask, [(0, 0), (0, 1)], constant_values=True)
    step, *past = run(logits_BV.argmax(-1)[:, None], mask, past=past)
    logits_BV = step[:, 0]
  found = np.stack(found, axis=1)
  decode = _generator(model.module)
  new = decode(model.params, prompts, max_new_tokens=7)
  assert found.argmax(-1).tolist() == [ids.tolist() for ids in new]
  rows = list(map(np.concatenate, zip(prompts, new, strict=True)))
  whole = np.stack([np.pad(ids, (0, 17 - len(ids))) for ids in rows])
  expected = _logits(model, whole, np.ones_like(whole, bool))
  after = size - 1 + np.arange(7)
  np.testing.assert_allclose(
    found, expected[np.arange(3)[:, None], after], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize("name", _DECODERS)
def test_cache_is_as_large_as_here(start, exported, name):
  model, folder = exported(name)
  _, *past = start(folder)(*_batch(model.num_rows))
  prefill = functools.partial(model.module.apply, method="prefill")
  inputs = jnp.zeros((3, 17), jnp.int32), jnp.zeros(3, jnp.int32)
  _, caches = jax.eval_shape(prefill, {"params": model.params}, *inputs)
  sizes = [sum(x.size for x in cache) for cache in caches]
  assert [
    k.size + v.size for k, v in zip(past[::2], past[1::2], strict=True)
  ] == sizes


@pytest.mark.parametrize(
  ("dtype", "most"), [("float16", 1e-4), ("int8", 0.25), ("int7", 0.25)]
)
def test_cache_of_smaller_dtypes_is_near_whole_passes(
  start, dtype, most, tmp_path
):
  model = models.make("lm", c.gpt2(num_layers=1, width=64, num_heads=4))
  onnx_export.export_onnx(tmp_path / "out", model, dtype)
  run = start(tmp_path / "out")
  tokens, mask = _batch(21)[0], np.ones((3, 17))
  whole, *_ = run(tokens, mask)
  _, *past = run(tokens[:, :-1], mask[:, :-1])
  found, *_ = run(tokens[:, -1:], mask, past=past)
  error = np.abs(found - whole[:, -1:]).mean() / np.abs(whole).mean()
  assert error < most


def test_cache_refuses_a_mask_without_the_past(start, tmp_path):
  onnx_export.export_onnx(tmp_path / "out", models.make("lm", _LLAMA))
  run = start(tmp_path / "out")
  tokens, mask = _batch(21)
  _, *past = run(tokens, mask)
  with pytest.raises(Exception, match="cannot be reshaped"):
    run(tokens[:, :1], mask[:, :1], past=past)


def test_pairs_have_segments(start, tmp_path):
  shape = dataclasses.replace(_BERT, segments=2)
  model = models.make("regress", shape)
  onnx_export.export_onnx(tmp_path / "out", model)
  tokens, mask = _batch(21)
  segments = np.arange(17) >= np.array([[9], [1], [17]])
  inputs = [jnp.asarray(x) for x in (tokens, mask, segments.astype(np.int32))]
  expected = jax.jit(model.module.apply)(
    {"params": model.params}, *inputs[:2], segments_BL=inputs[2]
  )
  [found] = start(tmp_path / "out")(tokens, mask, segments)
  assert found.shape == (3, 1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["classify", "lm"])
@pytest.mark.parametrize(
  ("dtype", "ratio", "most"),
  [("float16", 0.5, 5e-3), ("int8", 0.25, 0.25), ("int7", 0.25, 0.25)],
)
def test_smaller_dtypes_are_near(start, task, dtype, ratio, most, tmp_path):
  shape = {"num_layers": 1, "width": 64, "num_heads": 4}
  family = c.gpt2 if task == "lm" else c.bert  # tied embeddings in "lm"
  model = models.make(task, family(**shape), c.FoldConfig(groups=4))
  # Columns and rows of unlike size need scales of their own.
  model.params["blocks_0"]["mlp"]["up"]["kernel"][:, 3] *= 50
  model.params["embed"]["embedding"][5] *= 50
  model.params["blocks_0"]["mlp"]["up"]["kernel"][:, 4] = 0  # has no scale
  tokens, mask = _batch(21)
  sizes, found = [], []
  for one in ("float32", dtype):
    folder = tmp_path / one
    onnx_export.export_onnx(folder, model, one)
    sizes.append((folder / "model.onnx").stat().st_size)
    logits, *_ = start(folder)(tokens, mask)
    found.append(logits[mask] if task == "lm" else logits)
  assert 0.8 * ratio < sizes[1] / sizes[0] < ratio + 0.1
  error = np.abs(found[1] - found[0]).mean(0) / np.abs(found[0]).mean(0)
  assert 0 < error.min() <= error.max() < most, error


@pytest.mark.parametrize("task", ["regress", "embed"])
def test_max_drop_refuses_what_loses_more(start, task, tmp_path):
  shape = dataclasses.replace(_BERT, pooler=task == "regress")
  model = export_lib.shrunk(models.make(task, shape))
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(models.WORDS, 6)) for _ in range(24)]
  tokens = np.array(model.tokenizer.encode_batch(texts, 40))
  scores = []
  for dtype in ("float32", "int7"):
    onnx_export.export_onnx(tmp_path / dtype, model, dtype)
    found = start(tmp_path / dtype)(tokens, np.ones_like(tokens))[-1]
    if task == "embed":
      found /= np.linalg.norm(found, axis=1, keepdims=True)
      scores.append((found[:12] * found[12:]).sum(1))
    else:
      scores.append(found[:, 0])
  drop = 100 * (1 - stats.spearmanr(*scores).statistic)
  assert drop > 0
  rows, header = zip(scores[0], texts, strict=False), "score\ttext"
  if task == "embed":
    rows = zip(scores[0], texts[:12], texts[12:], strict=True)
    header = "score\tsentence1\tsentence2"
  lines = [header] + ["\t".join(map(str, row)) for row in rows]
  (tmp_path / "held.tsv").write_text("\n".join(lines))

  def save(max_drop):
    data = str(tmp_path / "held.tsv")
    model.save(tmp_path / "out", "onnx", "int7", max_drop=max_drop, data=data)

  with pytest.raises(ConfigError, match=f" {drop:.2f} points less"):
    save(drop - 0.01)
  assert not list(tmp_path.glob("out*"))
  save(drop + 0.01)
  assert (tmp_path / "out" / "model.onnx").is_file()
  assert f" {drop:.2f} points less" in (tmp_path / "out/README.md").read_text()


def test_max_drop_of_an_encoder_on_texts_counts_cosines(start, tmp_path):
  model = export_lib.shrunk(models.make("embed", _BERT))
  rng = np.random.default_rng(0)
  texts = [" ".join(rng.choice(models.WORDS, 6)) for _ in range(8)]
  (tmp_path / "held.txt").write_text("\n\n".join(texts))
  tokens = np.array(model.tokenizer.encode_batch(texts, 40))
  found = []
  for dtype in ("float32", "int7"):
    onnx_export.export_onnx(tmp_path / dtype, model, dtype)
    vectors = start(tmp_path / dtype)(tokens, np.ones_like(tokens))[-1]
    vectors = vectors.astype(np.float64)
    found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
  drop = 100 * (1 - np.mean(np.sum(found[0] * found[1], axis=1)))

  def save(max_drop):
    data = str(tmp_path / "held.txt")
    model.save(tmp_path / "out", "onnx", "int7", max_drop=max_drop, data=data)

  with pytest.raises(ConfigError, match=f" {drop:.2f} points less"):
    save(0.9 * drop)
  save(1.1 * drop)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    ("label\tsentence1\tsentence2", "pairs of texts .* reads single ones"),
    ("queue\tbody\tnote", "expects the columns label and text"),
  ],
)
def test_max_drop_on_other_columns_is_refused(header, message, tmp_path):
  model = export_lib.shrunk(models.make("classify", _BERT))
  data = tmp_path / "held.tsv"
  data.write_text(f"{header}\n{model.labels[0]}\tthe cat\ta dog\n")
  with pytest.raises(ConfigError, match=message):
    model.save(tmp_path / "out", "onnx", "int7", max_drop=9.0, data=str(data))
  assert not (tmp_path / "out").exists()


def test_max_drop_on_blank_lines_is_refused(tmp_path):
  model = export_lib.shrunk(models.make("embed", _BERT))
  data = tmp_path / "held.txt"
  data.write_text("\n \n")
  with pytest.raises(ConfigError, match="only blank lines"):
    model.save(tmp_path / "out", "onnx", "int7", max_drop=1.0, data=str(data))
  assert not (tmp_path / "out").exists()


def test_program_has_no_unused_array(tmp_path):
  """onnxruntime warns of each of them."""
  onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
  onnx_export.export_onnx(tmp_path / "out", models.make(model=_BERT))
  graph = onnx.load(tmp_path / "out" / "model.onnx").graph
  used = {name for node in graph.node for name in node.input}
  assert {array.name for array in graph.initializer} <= used


def test_int7_sums_fit_16_bits(tmp_path):
  onnx = pytest.importorskip("onnx", reason="needs the extra `onnx`")
  onnx_export.export_onnx(tmp_path, models.make("lm", _GPT2), "int7")
  graph = onnx.load(tmp_path / "model.onnx").graph
  arrays = map(onnx.numpy_helper.to_array, graph.initializer)
  largest = [np.abs(w).max() for w in arrays if w.dtype == np.int8]
  # Without VNNI, x86 adds two products with inputs of at most 255.
  assert largest
  assert 2 * 255 * max(map(int, largest)) < 2**15


def test_float16_refuses_weights_beyond_its_range(tmp_path):
  model = models.make(model=_BERT)
  model.params["blocks_1"]["mlp"]["up"]["kernel"][0, 0] = -1e5
  with pytest.raises(ConfigError, match=r"blocks_1/mlp/up.*1e\+05.*65504"):
    onnx_export.export_onnx(tmp_path / "out", model, "float16")
  assert not (tmp_path / "out").exists()


def test_sentence_encoder_has_states_and_vectors(start, tmp_path):
  source = tmp_path / "source"
  checkpoints.write(source, "bert")
  sentence.write(source, c.ModelConfig(pooling="mean", normalize=True), 9)
  model = folding.load(source)
  folder = tmp_path / "onnx"
  onnx_export.export_onnx(folder, model)
  tokens, mask = _batch(model.num_rows, model.config.data.length)
  hidden, vectors = start(folder)(tokens, mask)

  def blocks(module, tokens, mask):
    x_BLD = module.embed_tokens(tokens, True)
    for block in module.blocks:
      x_BLD = block(x_BLD, mask, True)
    return x_BLD

  variables = {"params": model.params}
  inputs = (jnp.asarray(tokens), jnp.asarray(mask))
  apply = jax.jit(functools.partial(model.module.apply, method=blocks))
  expected = apply(variables, *inputs)
  np.testing.assert_allclose(
    hidden[mask], np.asarray(expected)[mask], rtol=1e-4, atol=1e-4
  )
  means = [row[keep].mean(0) for row, keep in zip(hidden, mask, strict=True)]
  unit = [x / np.linalg.norm(x) for x in means]
  np.testing.assert_allclose(vectors, unit, rtol=1e-4, atol=1e-5)


def test_onnx_program_and_export_refuse_mistakes(start, tmp_path, monkeypatch):
  model = models.make(model=_BERT, length=8)
  onnx_export.export_onnx(tmp_path / "out", model)
  with pytest.raises(ConfigError, match="program for onnxruntime"):
    folding.load(tmp_path / "out")
  # It would be written in int8.
  with pytest.raises(ConfigError, match="int7, not bfloat16"):
    onnx_export.export_onnx(tmp_path / "other", model, "bfloat16")
  # More tokens than learned positions.
  with pytest.raises(Exception, match="by 9|bounds"):
    start(tmp_path / "out")(*_batch(21, 9))
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ConfigError, match=r"pip install .*onnx"):
    onnx_export.export_onnx(tmp_path / "other", model)
  assert not (tmp_path / "other").exists()
