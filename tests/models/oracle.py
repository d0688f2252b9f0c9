"""Attention and the whole model again, in NumPy float64 and unfolded."""

import math

import jax
import numpy as np

ACTIVATIONS = {
  "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
  "gelu_tanh": lambda x: (
    x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
  ),
  "silu": lambda x: x / (1 + np.exp(-x)),
  "relu": lambda x: np.maximum(x, 0),
}


def wide(*trees):
  """Returns NumPy float64 copies, so that no oracle computes in float32."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), trees)


def unfolded(x, K):
  """Returns K numbers a head where G are given: each G-th, K/G times."""
  G = x.shape[-1]
  return np.stack([x[..., k // (K // G)] for k in range(K)], -1)


def attend(q, k, v, bias, keep, cap=math.inf):
  """Softmax attention by loops, on unfolded queries and keys."""
  K = v.shape[-1]
  q, k, v, bias = wide(unfolded(q, K), unfolded(k, K), v, bias)
  num_heads, num_keys = q.shape[2], k.shape[1]
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, i, h in np.ndindex(q.shape[:3]):
    key_head = h // (num_heads // k.shape[2])
    value_head = h // (num_heads // v.shape[2])
    logits = np.full(num_keys, -np.inf)
    for j in range(num_keys):
      if keep is None or keep[b, j]:
        logits[j] = q[b, i, h] @ k[b, j, key_head] / np.sqrt(K)
        if cap < math.inf:
          logits[j] = cap * np.tanh(logits[j] / cap)
        logits[j] += bias[h % len(bias), i, j]
    weight = np.exp(logits - logits.max())
    for j in range(num_keys):
      out[b, i, h] += weight[j] / weight.sum() * v[b, j, value_head]
  return out


def turned(x, base):
  """Rotary positions: channels i and i + K/2 are one complex number."""
  half = x.shape[-1] // 2
  (x,) = wide(x)
  z = x[..., :half] + 1j * x[..., half:]
  for i, c in np.ndindex(x.shape[1], half):
    z[:, i, :, c] *= np.exp(1j * i / base ** (c / half))
  return np.concatenate([z.real, z.imag], -1)


class Model:
  """The whole model of a resolved config: tokens and keep to logits."""

  def __init__(self, config, params):
    self.c, self.task = config.model, config.task
    (self.p,) = wide(params)

  def norm(self, w, x):
    if self.c.norm == "layernorm":
      x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.c.norm_epsilon)
    return x * w["scale"] + w.get("bias", 0)

  def heads(self, w, x, K):
    kernel, bias = w["kernel"], w.get("bias", np.zeros(w["kernel"].shape[1:]))
    D, H = self.c.width, self.c.num_heads
    kernel = np.repeat(kernel, D // kernel.shape[0], 0)
    kernel = np.repeat(kernel, K // kernel.shape[2], 2)
    y = np.einsum("bld,dhk->blhk", x, kernel)
    y = y + np.repeat(bias, K // bias.shape[1], 1)
    return np.repeat(y, H // y.shape[2], 2)

  def values(self, w, x):
    if w is not None and "diagonal" not in w:
      return self.heads(w, x, w["kernel"].shape[2])
    v = x if w is None else x * w["diagonal"].reshape(-1)
    return v.reshape(*x.shape[:2], self.c.num_heads, -1)

  def attention(self, w, x, keep):
    q, k = (self.heads(w[name], x, self.c.head_dim) for name in "qk")
    v = self.values(w.get("v"), x)
    if self.c.positions == "rope":
      q, k = turned(q, self.c.rope_base), turned(k, self.c.rope_base)
    logits = np.einsum("blhk,bmhk->bhlm", q, k) / self.c.head_dim**0.5
    distance = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
    if self.c.positions == "alibi":
      slopes = np.exp(w["log_slopes"])
      logits = logits - slopes[:, None, None] * np.abs(distance)
    if self.c.relative_buckets:  # up to 7 away, a bucket each
      assert x.shape[1] <= 8
      bucket = np.where(distance < 0, 16 - distance, distance)
      logits = logits + w["relative_bias"][bucket].transpose(2, 0, 1)
    if self.c.causal:
      logits = np.where(distance >= 0, logits, -np.inf)
    logits = np.where(keep[:, None, None], logits, -np.inf)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    out = np.einsum("bhlm,bmhk,hkd->bld", weight, v, w["o"]["kernel"])
    return out + w["o"].get("bias", 0)

  def mlp(self, w, x):
    y = {n: x @ w[n]["kernel"] + w[n].get("bias", 0) for n in w if n != "down"}
    h = ACTIVATIONS[self.c.activation](y["gate"] if self.c.gated else y["up"])
    h = h * y["up"] if self.c.gated else h
    return h @ w["down"]["kernel"] + w["down"].get("bias", 0)

  def __call__(self, tokens, keep):
    p, pre = self.p, self.c.norm_position == "pre"
    tokens, keep = np.asarray(tokens), np.asarray(keep)
    x = p["embed"]["embedding"][tokens]
    if self.c.positions == "learned":
      x = x + p["position_embed"]["embedding"][: tokens.shape[1]]
    x = x if pre else self.norm(p["norm_embed"], x)
    for n in range(self.c.num_layers):
      w = p[f"blocks_{n}"]
      if pre:
        x = x + self.attention(w["attn"], self.norm(w["norm_attn"], x), keep)
        x = x + self.mlp(w["mlp"], self.norm(w["norm_mlp"], x))
      else:
        x = self.norm(w["norm_attn"], x + self.attention(w["attn"], x, keep))
        x = self.norm(w["norm_mlp"], x + self.mlp(w["mlp"], x))
    x = self.norm(p["norm_final"], x) if pre else x
    if self.task == "classify":
      mean = [row[k].mean(0) for row, k in zip(x, keep, strict=True)]
      x = x[:, 0] if self.c.pooling == "first" else np.stack(mean)
    head = p["head"]["kernel"] if "head" in p else p["embed"]["embedding"].T
    return x @ head + p.get("head", {}).get("bias", 0)
