import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from folding import config as c
from folding.errors import ConfigError
from folding.models import constant_state
from folding.models.transformer import Transformer
from folding.serving import generate
from folding.serving import sampling as sampling_lib
from folding.serving.generate import Generator
from folding.serving.sampling import Sampling
from tests.serving import models
from tests.serving.test_sampling import kept_by_oracle

NEW = 11
SHAPE = models.SHAPE | {"num_layers": 1}
MODELS = {
  "alibi_1": (c.ModelConfig(**SHAPE), {"groups": 1, "values": "diagonal"}),
  "learned": (c.gpt2(**SHAPE), {}),
  "rope_window": (
    c.llama(**SHAPE, num_kv_heads=2, window=5),
    {"groups": 2, "rope": "pairs"},
  ),
  # Only the first layer has a constant state.
  "learned_1_2": (
    c.gpt2(**(SHAPE | {"num_layers": 2})),
    {"groups": (1, 2), "values": "diagonal"},
  ),
  "alibi_window": (
    c.ModelConfig(**SHAPE, window=5),
    {"groups": 1, "values": "diagonal"},
  ),
}
# One is as long as the padded rows.
PROMPTS = [
  np.random.default_rng(n).integers(1, 19, length).astype(np.int32)
  for n, length in enumerate([3, 32, 1])
]


@functools.cache
def _make(name):
  shape, fold = MODELS[name]
  fold = c.FoldConfig(**({"groups": 0, "values": "dense"} | fold))
  return models.make("lm", shape, fold, length=48)


@functools.cache  # it compiles
def _generator(name):
  return Generator(_make(name).model)


@functools.cache
def _uncached(name):
  return Uncached(_make(name))


@pytest.fixture
def one():
  return _make("alibi_1")


@pytest.fixture
def generator():
  return _generator("alibi_1")


class Uncached:
  """Generates by a pass over all tokens for each new one."""

  def __init__(self, loaded):
    self._params = {"params": loaded.params}
    self._apply = jax.jit(loaded.module.apply)

  def logits(self, ids):
    # In one shape; later tokens are not seen.
    tokens = np.zeros((1, 48), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(self._apply(self._params, jnp.asarray(tokens)))[
      0, len(ids) - 1
    ]

  def __call__(self, prompt, choose, end_id=None, count=NEW):
    ids = list(prompt)
    for step in range(count):
      ids.append(choose(self.logits(ids), step))
      if ids[-1] == end_id:
        break
    return ids[len(prompt) :]


def _greedy(logits, step):
  del step
  best, second = np.sort(logits)[[-1, -2]]
  assert best - second > 1e-4, "a tie: choose another seed"
  return int(logits.argmax())


def _lists(rows):
  return [row.tolist() for row in rows]


@pytest.mark.parametrize("name", ["alibi_1", "rope_window"])
def test_greedy_tokens_equal_whole_passes(name):
  loaded, uncached, generator = _make(name), _uncached(name), _generator(name)
  free = [uncached(prompt, _greedy) for prompt in PROMPTS]
  found = generator(loaded.params, PROMPTS, max_new_tokens=NEW)
  assert {row.dtype for row in found} == {np.dtype("int32")}
  assert _lists(found) == free
  # A token that ends one row somewhere inside, and not all at once.
  end_id = free[0][4]
  expected = [uncached(prompt, _greedy, end_id) for prompt in PROMPTS]
  assert len({len(row) for row in expected}) > 1
  found = generator(loaded.params, PROMPTS, max_new_tokens=NEW, end_id=end_id)
  assert _lists(found) == expected


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [(1.5, None, None), (0.7, 4, None), (2.0, 6, 0.8)],
  ids=str,
)
def test_sampled_tokens_equal_the_oracle(
  one, generator, temperature, top_k, top_p
):
  uncached = _uncached("alibi_1")
  sampling, V = Sampling(temperature, top_k, top_p, 7), one.module.vocab_size
  key = jax.random.key(7)
  noise = [
    np.asarray(sampling_lib.noise(key, jnp.int32(step), len(PROMPTS), V))
    for step in range(NEW)
  ]

  def draw(row):
    def choose(logits, step):
      scaled = np.float64(logits) / temperature
      kept = sorted(kept_by_oracle(scaled, top_k, top_p))
      return max(kept, key=lambda v: scaled[v] + noise[step][row, v])

    return choose

  expected = [uncached(p, draw(row)) for row, p in enumerate(PROMPTS)]
  found = generator(one.params, PROMPTS, max_new_tokens=NEW, sampling=sampling)
  assert _lists(found) == expected
  assert expected != [uncached(p, _greedy) for p in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 8])
def test_stream_yields_the_same_tokens(one, generator, chunk):
  options = {"max_new_tokens": NEW, "sampling": Sampling(1.0, seed=1)}
  whole = generator(one.params, PROMPTS, **options)
  options["end_id"] = int(whole[1][2])
  whole = generator(one.params, PROMPTS, **options)
  streaming = generator if chunk == 8 else Generator(one.module, chunk=chunk)
  stream = streaming.stream(one.params, PROMPTS, **options)
  parts = list(stream)
  for row, expected in enumerate(whole):
    ids = [i for part in parts for i in part[row].tolist()]
    assert ids == expected.tolist()
  assert {len(part) for part in parts} == {len(PROMPTS)}
  rest = max(row.size for row in whole) - 1
  sizes = [max(ids.size for ids in part) for part in parts]
  assert sizes == [1, *[chunk] * (rest // chunk), *filter(None, [rest % chunk])]


def test_row_does_not_depend_on_its_batch(one, generator):
  options = {"max_new_tokens": 5, "sampling": Sampling(1.0)}
  (alone,) = generator(one.params, PROMPTS[:1], **options)
  together = generator(one.params, PROMPTS, **options)
  np.testing.assert_array_equal(together[0], alone)


@pytest.mark.parametrize(
  ("name", "margin", "sampling"),
  [
    ("alibi_1", 1.6, Sampling(1.0, seed=2)),
    ("learned_1_2", 0.4, Sampling()),
  ],
  ids=["wide", "remade_learned_with_kv_cache"],
)
def test_constant_state_gives_the_same_tokens(name, margin, sampling):
  loaded = _make(name)
  prompts = [ids[:28] for ids in PROMPTS]
  options = {"max_new_tokens": 20, "sampling": sampling}
  linear = Generator(loaded.module, "linear", margin=margin)
  states = []
  empty_states = constant_state.empty_states

  def counted(*args):
    states.append(args)
    return empty_states(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(constant_state, "empty_states", counted)
    found = linear(loaded.params, prompts, **options)
  assert (len(states) > 1) == (margin < 1)
  expected = _generator(name)(loaded.params, prompts, **options)
  assert _lists(found) == _lists(expected)


def test_state_remade_after_9_tokens_continues_the_draws(
  one, generator, monkeypatch
):
  # So warm that tokens follow the noise of their number.
  options = {"max_new_tokens": 20, "sampling": Sampling(30.0, seed=2)}
  expected = generator(one.params, PROMPTS, **options)
  # After the prompts, the first chunk and, outside, the second.
  flags = iter([False, False, True, False, False, False])
  monkeypatch.setattr(generate.State, "is_outside", lambda _: next(flags))
  linear = Generator(one.module, "linear")
  found = linear(one.params, PROMPTS, **options)
  assert next(flags, None) is None
  assert _lists(found) == _lists(expected)


@pytest.mark.parametrize("name", ["learned", "rope_window", "alibi_window"])
def test_model_without_constant_state_is_refused(name):
  with pytest.raises(ConfigError, match="no layer has a constant state"):
    Generator(_make(name).model, "linear")


def test_unknown_cache_is_refused(one):
  init = inspect.unwrap(Generator.__init__)  # without the type checker of tests
  with pytest.raises(ConfigError, match="keys or linear; it is 'kv'"):
    init(object.__new__(Generator), one.module, "kv")


@pytest.mark.parametrize("margin", [0.0, -1.0, np.nan])
def test_margin_that_never_covers_a_range_is_refused(one, margin):
  with pytest.raises(ConfigError, match="margin must be above 0; it is"):
    Generator(one.module, "linear", margin=margin)


class Counted(Transformer):
  """Counts how often it is traced."""

  def prefill(self, *args):
    TRACES.append("prefill")
    return super().prefill(*args)

  def decode(self, *args):
    TRACES.append("decode")
    return super().decode(*args)


TRACES: list[str] = []


def test_other_numbers_share_a_program(one):
  m = one.module
  model = Counted(m.shape, m.vocab_size)
  generator = Generator(model)

  def run(prompts, count, sampling):
    generator(one.params, prompts, max_new_tokens=count, sampling=sampling)
    return len(TRACES)

  first = run(PROMPTS, 12, Sampling(1.0, 3, 0.9))
  assert set(TRACES) == {"prefill", "decode"}
  shorter = [prompt[:2] for prompt in PROMPTS]
  assert run(shorter, 20, Sampling(0.3, 7, None, seed=5)) == first
  assert run(PROMPTS, 12, Sampling(1.0)) > first


def test_relative_positions_exceed_the_training_length(one, generator):
  prompt = np.ones(46, np.int32)
  (found,) = generator(one.params, [prompt], max_new_tokens=NEW)
  assert found.size == NEW


def test_learned_positions_are_used_up_to_the_last():
  loaded, generator = _make("learned"), _generator("learned")
  prompt = PROMPTS[1][:30]
  (found,) = generator(loaded.params, [prompt], max_new_tokens=18)
  assert found.tolist() == _uncached("learned")(prompt, _greedy, count=18)
  with pytest.raises(ConfigError, match="prompt 2 .* ask for 18 or fewer"):
    generator(loaded.params, [prompt[:1], prompt], max_new_tokens=19)
  with pytest.raises(ConfigError, match="48 positions .*; shorten it"):
    generator(loaded.params, [np.ones(48, int)], max_new_tokens=1)


@pytest.mark.parametrize(
  ("prompts", "count", "message"),
  [
    ([], 1, "no prompt"),
    ([[1], []], 1, "prompt 2 is empty"),
    ([[1, 21]], 1, "token id 21; those of the model are 0 to 20"),
    ([[-1]], 1, "token id -1"),
    ([[1]], 0, "at least 1; it is 0"),
  ],
)
def test_invalid_prompt_is_refused(one, generator, prompts, count, message):
  assert one.module.vocab_size == 21
  prompts = [np.array(ids, int) for ids in prompts]
  with pytest.raises(ConfigError, match=message):
    generator.stream(one.params, prompts, max_new_tokens=count)


def test_cache_of_a_layer_with_a_window_has_its_slots_alone():
  model = _make("rope_window")
  prefill = functools.partial(
    generate.prefill, model.module, states=None, num_slots=32
  )
  state = jax.eval_shape(
    prefill,
    model.params,
    jnp.ones((1, 8), jnp.int32),
    jnp.zeros(1, jnp.int32),
    draw=sampling_lib.make_draw(Sampling(), model.num_rows),
    num_new=jnp.int32(0),
  )
  assert state.caches[0].k.shape[2] == 5


def test_cache_beyond_memory_is_refused(one, generator):
  with pytest.raises(ConfigError, match=r"tokens would need .* GiB of keys"):
    generator(one.params, PROMPTS, max_new_tokens=10**12)


def test_single_text_is_not_printed_before_an_error(one):
  pieces = generate.continue_texts(
    one, ["a"], max_new_tokens=10**12, sampling=Sampling()
  )
  with pytest.raises(ConfigError, match="GiB of keys"):
    next(pieces)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_model_with_nan_is_refused(one, generator, temperature):
  params = jax.tree.map(jnp.asarray, one.params)
  params["embed"]["embedding"] = params["embed"]["embedding"].at[5].set(np.nan)
  sampling = Sampling(temperature, seed=1)
  with pytest.raises(ConfigError, match="NaN"):
    generator(params, PROMPTS, max_new_tokens=NEW, sampling=sampling)


@pytest.mark.parametrize(
  ("task", "causal", "message"),
  [
    ("classify", True, "is a classifier"),
    ("embed", True, "makes vectors"),
    ("embed", False, "makes vectors"),
  ],
)
def test_model_without_next_token_is_refused(task, causal, message):
  model = models.make(task, c.ModelConfig(**SHAPE, causal=causal)).model
  with pytest.raises(ConfigError, match=message):
    Generator(model)
