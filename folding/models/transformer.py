"""A transformer that its shape makes a BERT, a GPT-2 or a Llama.

Paths of its parameters, which are a contract on disk, are in `params`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core
from jaxtyping import Array, Bool, Float, Int

from folding import paths
from folding.errors import ConfigError
from folding.models import products
from folding.models.attention import Attention
from folding.models.decode import Cache, Step
from folding.models.exact_attention import soft_cap
from folding.models.linear_attention import PastState
from folding.models.shape import Layer, Shape


def _gelu(x: Array) -> Array:
  """Returns x P(X < x) for a normal X."""
  if x.dtype != jnp.float32:  # 1 + erf would lose bits
    return jax.nn.gelu(x, approximate=False)
  # JAX calls erfc, which takes longer on a CPU.
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


_ACTIVATIONS = {
  "gelu": _gelu,
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "tanh": jnp.tanh,  # of a pooler
}


def _norm(shape: Shape, dtype: Any) -> nn.Module:
  if shape.norm == "rmsnorm":
    return nn.RMSNorm(shape.norm_epsilon, dtype=dtype)
  return nn.LayerNorm(shape.norm_epsilon, dtype=dtype, use_bias=shape.use_bias)


def _residual_init(shape: Shape) -> nn.initializers.Initializer:
  """Initializer of W_O and W_down, scaled by (2 N)^(-1/2) (Radford et al. 2019)."""
  return nn.initializers.variance_scaling(
    1 / (2 * shape.num_layers), "fan_in", "truncated_normal"
  )


class MLP(nn.Module):
  """Feed-forward layer: down(activation(up(x)) [* gate(x)])."""

  shape: Shape
  features: int  # F
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c, F = self.shape, self.features

    def dense(name: str, features: int, **options: Any):
      return nn.Dense(
        features,
        use_bias=c.use_bias,
        dtype=self.dtype,
        name=name,
        dot_general=_dot_rows,
        **options,
      )

    activation = _ACTIVATIONS[c.activation]
    if c.gated:
      gate_BLF = activation(dense("gate", F)(x_BLD))
      h_BLF = gate_BLF * dense("up", F)(x_BLD)
    else:
      h_BLF = activation(dense("up", F)(x_BLD))
    return dense("down", c.width, kernel_init=_residual_init(c))(h_BLF)


def _dot_rows(x: Array, kernel: Any, _: Any, **options: Any) -> Array:
  """Returns x @ kernel, as a product of two matrices.

  With more axes XLA transposes large arrays for the gradients on a CPU. The
  kernel may be quantised by another library, which replaces `lax.dot_general`.
  """
  rows = products.project(
    x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options
  )
  return rows.reshape(*x.shape[:-1], rows.shape[-1])


class Block(nn.Module):
  """One layer: attention and a feed-forward layer, with norms.

  They are before each branch ("pre"), after each sum ("post"), or before and
  after each branch ("both"). Parallel branches read the same stream.
  """

  shape: Shape
  layer: Layer
  dtype: Any = jnp.float32

  def setup(self):
    c = self.shape
    self.attn = Attention(c, self.layer, _residual_init(c), self.dtype)
    self.mlp = MLP(c, self.layer.mlp_width, self.dtype)
    if self.layer.has_norm_attn:
      self.norm_attn = _norm(c, self.dtype)
    self.norm_mlp = _norm(c, self.dtype)
    if c.norm_position == "both":
      self.norm_attn_out = _norm(c, self.dtype)
      self.norm_mlp_out = _norm(c, self.dtype)
    self.dropout = nn.Dropout(c.dropout)

  def __call__(
    self,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"] | None,
    deterministic: bool,
  ) -> Float[Array, "B L D"]:
    """Returns the output of the layer for whole sequences.

    Args:
      x_BLD: Input.
      mask_BL: False or 0 at pad tokens; None: no padding.
      deterministic: No dropout.
    """

    def attend(x_BLD):
      return self.attn(x_BLD, mask_BL), None

    return self._run(x_BLD, attend, deterministic)[0]

  def prefill(
    self,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"],
    state: PastState | None,
  ) -> tuple[Float[Array, "B L D"], Cache]:
    """Returns output and cache for prompts; see `Attention.prefill`."""
    return self._run(x_BLD, lambda x: self.attn.prefill(x, mask_BL, state))

  def decode(
    self, x_B1D: Float[Array, "B 1 D"], cache: Cache, step: Step
  ) -> tuple[Float[Array, "B 1 D"], Cache]:
    """Returns output and cache after one more token per row."""
    return self._run(x_B1D, lambda x: self.attn.decode(x, cache, step))

  def _run(
    self,
    x_BLD: Float[Array, "B L D"],
    attend: Callable[[Array], tuple[Array, Any]],
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B L D"], Any]:
    """Returns the output of the layer, and the cache from `attend`."""

    def drop(x_BLD):
      return self.dropout(x_BLD, deterministic=deterministic)

    norms, before_BLD = self.shape.norm_position, x_BLD
    out_BLD, cache = attend(self.attention_input(x_BLD))
    if norms == "post":
      x_BLD = self.norm_attn(x_BLD + drop(out_BLD))
      return self.norm_mlp(x_BLD + drop(self.mlp(x_BLD))), cache
    if norms == "both":
      out_BLD = self.norm_attn_out(out_BLD)
    x_BLD += drop(out_BLD)
    read_BLD = before_BLD if self.shape.parallel else x_BLD
    out_BLD = self.mlp(self.norm_mlp(read_BLD))
    if norms == "both":
      out_BLD = self.norm_mlp_out(out_BLD)
    return x_BLD + drop(out_BLD), cache

  def attention_input(self, x_BLD: Float[Array, "B L D"]) -> Array:
    """Returns the input of attention, which is normed unless "post"."""
    is_post = self.shape.norm_position == "post"
    if is_post or not self.layer.has_norm_attn:
      return x_BLD
    return self.norm_attn(x_BLD)


class Transformer(nn.Module):
  """Tokens to logits: of the next token, or of a whole text if C is not 0.

  A model of task "embed" has no head; it maps a text to a vector.

  Example:
    >>> from folding.config import Config
    >>> from folding.models.shape import shape_of
    >>> model = make_model(shape_of(Config()), vocab_size=100)
    >>> tokens = jnp.zeros((2, 8), jnp.int32)
    >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    >>> params["blocks_0"]["attn"]["q"]["kernel"].shape  # D, H, G
    (128, 16, 1)
    >>> jax.jit(model.apply)({"params": params}, tokens).shape
    (2, 8, 100)
  """

  shape: Shape
  vocab_size: int  # V
  num_classes: int = 0  # C, outputs of the head, if it gives scores

  def setup(self):
    c = self.shape
    dtype = jnp.dtype(c.dtype)

    width = c.embed_width or c.width

    def embed(size, width=width):
      init = nn.initializers.normal(0.02)
      return nn.Embed(size, width, embedding_init=init, dtype=dtype)

    rank, added_width = c.embedding_rank, c.shared_rank or width
    self.embed = embed(self.vocab_size, rank or width)
    if rank:
      self.embed_expand = nn.Dense(
        width, use_bias=not c.shared_rank, dtype=dtype
      )
    if c.positions == "learned":
      self.position_embed = embed(c.max_length, added_width)
    if c.segments:
      self.segment_embed = embed(c.segments, added_width)
    if c.norm_position == "post" or c.embed_norm:
      self.norm_embed = _norm(c, dtype)
    if c.embed_width:
      self.embed_project = nn.Dense(
        c.width, use_bias=not c.project_first, dtype=dtype
      )
    self.dropout = nn.Dropout(c.dropout)
    block = nn.remat(Block, static_argnums=(3,)) if c.remat else Block
    self.blocks = [block(c, layer, dtype) for layer in c.layers]
    if c.norm_position != "post":
      self.norm_final = _norm(c, dtype)
    if c.output == "scores":
      has_norm = c.pooler and c.pooler_norm
      if c.pooler:
        self.pooler = nn.Dense(c.width, use_bias=not has_norm)
      if has_norm:
        self.norm_pooler = _norm(c, jnp.float32)
      self.head = nn.Dense(self.num_classes, use_bias=c.use_bias or has_norm)
    elif c.output == "tokens" and not c.tie_embeddings:
      self.head = nn.Dense(
        self.vocab_size, use_bias=False, dtype=dtype, dot_general=_dot_rows
      )

  def __call__(
    self,
    tokens_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"] | None = None,
    deterministic: bool = True,
    segments_BL: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L V"] | Float[Array, "B C"] | Float[Array, "B D"]:
    """Returns the logits, or the vectors, of whole sequences.

    Args:
      tokens_BL: Token ids, right-padded.
      mask_BL: False or 0 at pad tokens; None: no padding.
      deterministic: No dropout.
      segments_BL: Text of a pair that each token belongs to, 0 or 1; None: 0.
        A model without a segment embedding ignores it.

    Raises:
      ValueError: there is no token, or the sequences exceed the learned
        positions.
    """
    x_BLD = self.encode(tokens_BL, mask_BL, deterministic, segments_BL)
    return self.read_out(x_BLD, mask_BL)

  def encode(
    self,
    tokens_BL: Int[Array, "B L"],
    mask_BL: Bool[Array, "B L"] | None = None,
    deterministic: bool = True,
    segments_BL: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Returns the output of the last block, the input of `read_out`.

    Arguments and errors are those of `__call__`.
    """
    if not tokens_BL.size:
      raise ValueError(
        f"tokens have the shape {tokens_BL.shape}; a batch has a row and a token"
      )
    x_BLD = self.embed_tokens(tokens_BL, deterministic, segments_BL=segments_BL)
    for _, group in itertools.groupby(self.blocks, lambda block: block.layer):
      blocks = list(group)
      scans = self.shape.scan_layers and len(blocks) > 1
      if scans and not self.is_initializing():
        x_BLD = self._scan(blocks, x_BLD, mask_BL, deterministic)
        continue
      for block in blocks:
        x_BLD = block(x_BLD, mask_BL, deterministic)
    return x_BLD

  def _scan(
    self,
    blocks: Sequence[Block],
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"] | None,
    deterministic: bool,
  ) -> Float[Array, "B L D"]:
    """Returns the output of layers that are alike, compiled once as a loop.

    Variables that a layer stores, such as observed statistics, are stored under
    its own path. Interceptors see a layer once, without its name.
    """
    c, first = self.shape, blocks[0]
    block = Block(c, first.layer, first.dtype, parent=None)
    params = jax.tree.map(
      lambda *ws: jnp.stack(ws), *(b.variables["params"] for b in blocks)
    )
    keys = None
    if c.dropout and not deterministic:
      keys = jnp.stack([b.make_rng("dropout") for b in blocks])
    bound: Any = self.scope
    mutable = core.scope.union_filters(bound.mutable, [])

    def run(scope, x_BLD):
      return block.clone(parent=scope)(x_BLD, mask_BL, deterministic)

    def step(x_BLD, inputs):
      params, key = inputs
      rngs = None if key is None else {"dropout": key}
      return core.apply(run, mutable)({"params": params}, x_BLD, rngs=rngs)

    if c.remat:
      step = jax.checkpoint(step, prevent_cse=False)
    x_BLD, stored = jax.lax.scan(step, x_BLD, (params, keys))
    for n, each in enumerate(blocks):
      for collection, values in stored.items():
        for name, value in values.items():
          value = jax.tree.map(lambda x, n=n: x[n], value)
          each.put_variable(collection, name, value)
    return x_BLD

  def prefill(
    self,
    tokens_BL: Int[Array, "B L"],
    start_B: Int[Array, " B"],
    states: Sequence[PastState | None] | None = None,
  ) -> tuple[Float[Array, "B V"], list[Cache]]:
    """Returns the logits after prompts, and the cache of each layer.

    Args:
      tokens_BL: Left-padded prompts (training batches are right-padded).
      start_B: Number of pad tokens at the start of each row.
      states: Empty states of the layers that decode in constant size; the
        others, and all if None, get a KV cache of L slots.
    """
    index_L = jnp.arange(tokens_BL.shape[1])
    position_BL = index_L[None] - start_B[:, None]
    x_BLD = self.embed_tokens(tokens_BL, True, jnp.maximum(position_BL, 0))
    caches = []
    for n, block in enumerate(self.blocks):
      state = states[n] if states else None
      x_BLD, cache = block.prefill(x_BLD, position_BL >= 0, state)
      caches.append(cache)
    return self.read_out(x_BLD[:, -1:])[:, 0], caches

  def decode(
    self, tokens_B: Int[Array, " B"], caches: Sequence[Cache], step: Step
  ) -> tuple[Float[Array, "B V"], list[Cache]]:
    """Returns the logits after one more token per row, and the new caches.

    Args:
      tokens_B: The new tokens.
      caches: From `prefill`, or from here.
      step: Position of the new tokens.
    """
    position_B1 = (step.position - step.start_B)[:, None]
    # `generate` discards what is computed past the last learned position.
    position_B1 = jnp.minimum(position_B1, self.shape.max_length - 1)
    x_B1D = self.embed_tokens(tokens_B[:, None], True, position_B1)
    updated = []
    for block, cache in zip(self.blocks, caches, strict=True):
      x_B1D, cache = block.decode(x_B1D, cache, step)
      updated.append(cache)
    return self.read_out(x_B1D)[:, 0], updated

  def embed_tokens(
    self,
    tokens_BL: Int[Array, "B L"],
    deterministic: bool = True,
    position_BL: Int[Array, "B L"] | None = None,
    segments_BL: Int[Array, "B L"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Returns the input of the first block.

    Args:
      tokens_BL: Token ids.
      deterministic: No dropout.
      position_BL: Positions of the tokens; None: 0, 1, ...
      segments_BL: As for `__call__`.

    Raises:
      ValueError: the sequences exceed the learned positions.
    """
    c = self.shape
    x_BLD = self.embed(tokens_BL)
    if c.embedding_rank and not c.shared_rank:
      x_BLD = self.embed_expand(x_BLD)
    if c.scale_embeddings:
      x_BLD *= jnp.asarray(c.width**0.5, x_BLD.dtype)
    if c.positions == "learned":
      if position_BL is None:
        length = tokens_BL.shape[1]
        if length > self.shape.max_length:  # the logits would be NaN
          raise ValueError(
            f"a sequence of {length} tokens exceeds the {self.shape.max_length} "
            "learned positions"
          )
        position_BL = jnp.arange(length)[None]
      x_BLD += self.position_embed(position_BL)
    if c.segments:
      if segments_BL is None:
        segments_BL = jnp.zeros((1, 1), jnp.int32)
      x_BLD += self.segment_embed(segments_BL)
    if c.shared_rank:
      x_BLD = self.embed_expand(x_BLD)
    if c.embed_width and c.project_first:
      x_BLD = self.embed_project(x_BLD)
    if c.norm_position == "post" or c.embed_norm:
      x_BLD = self.norm_embed(x_BLD)
    if c.embed_width and not c.project_first:
      x_BLD = self.embed_project(x_BLD)
    return self.dropout(x_BLD, deterministic=deterministic)

  def read_out(
    self,
    x_BLD: Float[Array, "B L D"],
    mask_BL: Bool[Array, "B L"] | None = None,
  ) -> Float[Array, "B L V"] | Float[Array, "B C"] | Float[Array, "B D"]:
    """Returns the logits, or the vectors of texts.

    Args:
      x_BLD: Output of the last block.
      mask_BL: False or 0 at pad tokens; None: no padding.
    """
    c = self.shape
    if c.norm_position != "post":
      x_BLD = self.norm_final(x_BLD)
    if c.output != "tokens":
      pooled_BD = _pool(x_BLD, mask_BL, c.pooling)
      if c.output == "vector":
        return unit(pooled_BD) if c.normalize else pooled_BD
      if c.pooler:
        activation = _ACTIVATIONS[c.pooler_activation]
        pooled_BD = activation(self.pooler(pooled_BD))
        if c.pooler_norm:
          pooled_BD = self.norm_pooler(pooled_BD)
      return self.head(pooled_BD)
    if c.tie_embeddings:
      if c.embed_width:
        x_BLD = x_BLD @ self.embed_project.variables["params"]["kernel"].T
      dtype = self.embed.dtype
      kernel_DV = self.embed.embedding.T.astype(dtype)
      logits_BLV = _dot_rows(x_BLD.astype(dtype), kernel_DV, None)
    else:
      logits_BLV = self.head(x_BLD)
    return soft_cap(logits_BLV.astype(jnp.float32), c.logit_cap)

  def read_out_params(self, params: Any) -> Any:
    """Returns the part of the parameters that `read_out` reads."""
    is_tied = self.shape.tie_embeddings and self.shape.output == "tokens"
    output = {"embed", "embed_project"} if is_tied else {"head"}
    names = {"norm_final", "pooler", "norm_pooler"} | output
    return {name: w for name, w in params.items() if name in names}


def _pool(
  x_BLD: Float[Array, "B L D"],
  mask_BL: Bool[Array, "B L"] | None,
  pooling: str,
) -> Float[Array, "B D"]:
  """Returns the vector of the first or last token, or the mean over tokens."""
  x_BLD = x_BLD.astype(jnp.float32)
  if pooling == "first":
    return x_BLD[:, 0]
  if pooling == "last":
    length_B = (
      jnp.full(x_BLD.shape[:1], x_BLD.shape[1])
      if mask_BL is None
      else mask_BL.sum(axis=1)
    )
    last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
    return jnp.take_along_axis(x_BLD, last_B11, axis=1)[:, 0]
  if mask_BL is None:
    return x_BLD.mean(axis=1)
  mask_BL1 = mask_BL[..., None].astype(jnp.float32)
  count_B1 = jnp.maximum(mask_BL1.sum(axis=1), 1)
  return (x_BLD * mask_BL1).sum(axis=1) / count_B1


def unit(x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
  """Returns vectors of length 1; a zero vector stays zero."""
  square_B1 = jnp.sum(jnp.square(x_BD), axis=-1, keepdims=True)
  return x_BD * jax.lax.rsqrt(jnp.maximum(square_B1, 1e-24))


def make_model(
  shape: Shape, vocab_size: int, num_classes: int = 0
) -> Transformer:
  """Returns the model of a shape.

  Args:
    shape: From `shape_of`.
    vocab_size: V, from the tokenizer.
    num_classes: C, outputs of the head, from the data; ignored for models
      without one.
  """
  if shape.output != "scores":
    num_classes = 0
  return Transformer(shape, vocab_size, num_classes)


def model_for(shape: Shape, params: Mapping[str, Any]) -> Transformer:
  """Returns the model of a shape, sized by its or the dense parameters."""
  num_classes = params["head"]["kernel"].shape[1] if "head" in params else 0
  return make_model(shape, len(params["embed"]["embedding"]), num_classes)


# A run asks several times, and each call would trace the model. The cast: pyright
# does not see that Flax modules are hashable.
@cast(Any, functools.cache)
def param_shapes(model: Transformer) -> Any:
  """Returns the shapes of the parameters, without computing them."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def require_params(
  model: Transformer, shapes: Mapping[str, tuple[int, ...]], place: str
) -> None:
  """Raises `ConfigError` unless {path: shape} are the parameters of a model.

  `place` says in the message where the parameters are.
  """
  made = paths.flatten(param_shapes(model))
  expected = {name: x.shape for name, x in made.items()}
  for name in sorted(expected.keys() | shapes.keys()):
    if expected.get(name) != shapes.get(name):
      raise ConfigError(
        f"the parameters in {place} are not of its config and labels: {name} is "
        f"{shapes.get(name)}, not {expected.get(name)}"
      )
