import jax.numpy as jnp
import numpy as np
import pytest

from folding.compression import sites as sites_lib
from folding.compression.sites import Rule

_TIED = {r"\1/down/kernel": 0, r"\1/up/bias": -1}


def _layer(width=4, hidden=6):
  return {
    "up": {"kernel": np.ones((width, hidden)), "bias": np.ones(hidden)},
    "down": {"kernel": np.ones((hidden, width))},
  }


def _params():
  return {
    "a": {"mlp": _layer()},
    "b": {"mlp": _layer(hidden=8)},
    "embed": np.ones((9, 4)),
    "scale": np.ones(()),
    "square": np.ones((6, 6)),  # of a recurrent layer
    "pair": np.ones((2, 16)),
    "stack": np.ones((4, 8, 16)),  # of nn.scan, or a kernel [D, H, K]
  }


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"target": 1.0}, r"target must be in \[0, 1\); it is 1\.0"),
    ({"target": -0.1}, "target .* it is -0.1"),
    ({"target": "0.5"}, "target .* it is '0.5'"),
    ({"pattern": None}, "pattern .* it is None"),
    ({"granularity": "column"}, "granularity .* it is 'column'"),
    ({"tied": {"x": 0}}, "tied must be empty"),
    ({"granularity": "row", "tied": ["x"]}, r"tied .* it is \['x'\]"),
    ({"granularity": "row", "tied": {"x": "0"}}, "tied .* it is {'x': '0'}"),
    ({"axis": 0}, "axis must be None"),
    ({"granularity": "row", "axis": 1.0}, "axis .* it is 1.0"),
    ({"layers": -1}, "layers .* it is -1"),
    ({"inputs": "1"}, "inputs .* it is '1'"),
    ({"score": "size"}, "score must be one of .* it is 'size'"),
    ({"score": ""}, "score must be one of .* it is ''"),
  ],
)
def test_rule_refuses_impossible_values(options, message):
  options = {"pattern": "w", "target": 0.5} | options
  name = options["pattern"]
  with pytest.raises(ValueError, match=f"rule {name!r}: {message}"):
    Rule(**options)


def test_make_sites_keeps_the_order_of_rules_and_parameters():
  sites = sites_lib.make_sites(
    [Rule(r"(.*/mlp)/up/kernel", 0.5, "neuron", _TIED), Rule("embed", 0.1)],
    _params(),
  )
  assert [(s.name, s.rule, s.shape, dict(s.members)) for s in sites] == [
    (
      "a/mlp/up/kernel",
      0,
      (6,),
      {"a/mlp/up/kernel": 1, "a/mlp/down/kernel": 0, "a/mlp/up/bias": 0},
    ),
    (
      "b/mlp/up/kernel",
      0,
      (8,),
      {"b/mlp/up/kernel": 1, "b/mlp/down/kernel": 0, "b/mlp/up/bias": 0},
    ),
    ("embed", 1, (9, 4), {"embed": None}),
  ]


def test_make_sites_takes_rows_from_the_first_axis_and_neurons_from_the_last():
  params = {"w": np.ones((5, 3))}
  (row,) = sites_lib.make_sites([Rule("w", 0.5, "row")], params)
  (neuron,) = sites_lib.make_sites([Rule("w", 0.5, "neuron")], params)
  assert (row.shape, dict(row.members)) == ((5,), {"w": 0})
  assert (neuron.shape, dict(neuron.members)) == ((3,), {"w": 1})


@pytest.mark.parametrize(
  ("inputs", "axis"), [(None, 1), (0, 1), (1, 0), (-1, 0)]
)
def test_neurons_are_on_the_axis_that_has_no_inputs(inputs, axis):
  rule = Rule("w", 0.5, "neuron", inputs=inputs)
  (site,) = sites_lib.make_sites([rule], {"w": np.ones((3, 3))})
  assert dict(site.members) == {"w": axis}


# Layers of nn.scan along axis 0 and 1; then layers that are not stacked.
@pytest.mark.parametrize(
  ("shapes", "axis"),
  [
    ({"up/kernel": (3, 8, 6), "up/bias": (3, 6)}, 0),
    ({"up/kernel": (3, 8, 6), "norm/scale": (3, 8)}, 0),
    ({"up/kernel": (8, 3, 6), "up/bias": (6, 3)}, 1),
    ({"o/kernel": (8, 3, 6), "i/kernel": (6, 3, 8), "n/scale": (8, 3)}, 1),
    ({"up/kernel": (8, 3, 6)}, None),
    ({"q/kernel": (8, 4, 4), "q/bias": (4, 4)}, None),
    ({"q/kernel": (8, 4, 2), "o/kernel": (4, 2, 8), "norm/scale": (8,)}, None),
    ({"conv/kernel": (3, 3, 8, 3), "conv/bias": (3,)}, None),
  ],
)
def test_stacking_axis_is_seen_by_the_vectors_of_layers(shapes, axis):
  leaves = {f"layers/{n}": np.ones(shape) for n, shape in shapes.items()}
  assert sites_lib.stacking_axis(next(iter(leaves)), leaves) == axis


@pytest.mark.parametrize(("axis", "size"), [(0, 5), (1, 2), (-1, 3)])
def test_make_sites_takes_units_from_the_axis_of_the_rule(axis, size):
  rule = Rule("w", 0.5, "neuron", axis=axis)
  (site,) = sites_lib.make_sites([rule], {"w": np.ones((5, 2, 3))})
  assert (site.shape, dict(site.members)) == ((size,), {"w": axis % 3})


def _neuron(tied):
  return [Rule(r"(a/mlp)/up/kernel", 0.5, "neuron", tied)]


@pytest.mark.parametrize(
  ("rule_list", "message"),
  [
    ([Rule("heads", 0.5)], "'heads' matches no parameter; there are a/mlp"),
    (
      [Rule("a/.*", 0.5), Rule(r".*/up/kernel", 0.1)],
      r"'a/mlp/up/kernel' is claimed by rules 'a/\.\*' and '\.\*/up/kernel'",
    ),
    (
      [*_neuron(_TIED), Rule("a/mlp/down/kernel", 0.1)],
      r"'a/mlp/down/kernel' is claimed by rules",
    ),
    (_neuron({r"\1/down": 0}), "ties 'a/mlp/down' .* no such parameter"),
    (
      _neuron({r"\1/down/kernel": 1}),
      r"axis 1 of 'a/mlp/down/kernel' \(6, 4\) does not index the 6 neurons",
    ),
    (_neuron({r"\1/up/bias": 1}), r"axis 1 of 'a/mlp/up/bias' \(6,\) does not"),
    (
      [Rule("square", 0.5, "neuron", {"square": 0})],
      "ties 'square' to itself .* one axis of an array can index neurons",
    ),
    (
      _neuron({r"\1/up/bias": 0, "a/mlp/up/bias": -1}),
      "ties 'a/mlp/up/bias' to itself or twice",
    ),
    (_neuron({r"\2/up/bias": 0}), r"ties '.*2/up/bias', which does not expand"),
    ([Rule("a/mlp/up/bias", 0.5, "row")], r"'row' needs a matrix; .*bias"),
    ([Rule("scale", 0.5)], r"'weight' needs a vector; 'scale' has shape \(\)"),
    (
      [Rule("stack", 0.5, "neuron")],
      r"'stack' .* name the axis of its neurons",
    ),
    ([Rule("stack", 0.5, "row")], "'stack' .* name the axis of its rows"),
    (
      [Rule("embed", 0.5, "row", axis=2)],
      r"axis 2 .* none of 'embed' \(9, 4\)",
    ),
    (
      [Rule("embed", 0.5, layers=2)],
      r"layers along axis 2, which 'embed' \(9, 4\) does not have",
    ),
    (
      [Rule("embed", 0.5, inputs=2)],
      r"inputs 2 .* not an axis of 'embed' \(9, 4\)",
    ),
    (
      [Rule("stack", 0.5, "neuron", {"pair": 0}, layers=0)],
      r"'pair' \(2, 16\) and 'stack' \(4, 8, 16\) stack different",
    ),
  ],
  ids=[
    "no-match",
    "claimed-twice",
    "claimed-as-tied",
    "no-tied",
    "tied-size",
    "tied-axis",
    "tied-to-itself",
    "tied-twice",
    "tied-group",
    "row-of-vector",
    "scalar",
    "stacked-neurons",
    "stacked-rows",
    "axis",
    "no-layers",
    "inputs",
    "other-layers",
  ],
)
def test_make_sites_refuses_a_rule_that_does_not_fit(rule_list, message):
  with pytest.raises(ValueError, match=message):
    sites_lib.make_sites(rule_list, _params())


@pytest.mark.parametrize("w", [jnp.zeros((0, 4)), jnp.ones((2, 4), complex)])
def test_make_sites_refuses_empty_and_complex_arrays(w):
  with pytest.raises(ValueError, match=r"'w' is .*\[., 4\]; .* real numbers"):
    sites_lib.make_sites([Rule("w", 0.5)], {"w": w})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expand_puts_units_along_their_axis(axis):
  w = np.random.default_rng(0).normal(size=(3, 3, 3))
  site = sites_lib.Site("w", 0, (3,), {"w": axis})
  units = jnp.array([True, False, True])
  found = jnp.broadcast_to(site.expand(units, "w", 3), w.shape)
  for index in np.ndindex(w.shape):
    assert found[index] == units[index[axis]]


def test_expand_of_weights_returns_the_bits():
  site = sites_lib.Site("w", 0, (2, 2), {"w": None})
  units = jnp.array([[True, False], [False, True]])
  assert site.expand(units, "w", 2) is units


def test_reduce_equals_a_loop_over_the_arrays_of_a_neuron():
  rng = np.random.default_rng(0)
  arrays = {
    "up": rng.normal(size=(4, 6)),
    "bias": rng.normal(size=6),
    "down": rng.normal(size=(6, 2, 3)),
  }
  site = sites_lib.Site("up", 0, (6,), {"up": 1, "bias": 0, "down": 0})
  expected = [
    sum(arrays["up"][d, f] for d in range(4))
    + arrays["bias"][f]
    + sum(arrays["down"][f, i, j] for i in range(2) for j in range(3))
    for f in range(6)
  ]
  found = site.reduce({n: jnp.asarray(a) for n, a in arrays.items()})
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_reduce_by_all_needs_every_element():
  site = sites_lib.Site("up", 0, (3,), {"up": 1, "bias": 0})
  found = site.reduce(
    {
      "up": jnp.array([[True, True, False], [True, True, True]]),
      "bias": jnp.array([True, False, True]),
    },
    jnp.all,
  )
  assert found.tolist() == [True, False, False]


@pytest.mark.parametrize("size", [1, 8, 9])
def test_pack_stores_a_bit_per_element(size):
  bits = np.random.default_rng(size).random((3, 2, size)) < 0.5
  packed = sites_lib.pack(jnp.asarray(bits))
  np.testing.assert_array_equal(packed, np.packbits(bits, axis=-1))
  assert packed.nbytes == 3 * 2 * -(-size // 8)
  np.testing.assert_array_equal(sites_lib.unpack(packed, size), bits)
