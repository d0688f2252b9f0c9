"""The optimizer chain and the pruning rules of a configuration."""

import dataclasses
import math
import re
from typing import Any

import jax
import optax

from folding import paths
from folding.compression.accounting import group_of
from folding.compression.fpp import fpp
from folding.compression.scores import SCORES
from folding.compression.sites import Rule, make_sites
from folding.config import Config, layers_of
from folding.schema import ConfigError

_TOKENS = "embed/embedding"


def make_schedule(config: Config) -> optax.Schedule:
  """Returns linear warm-up, then a cosine to a fraction of the peak."""
  t = config.train
  warmup = max(1, round(t.warmup * t.steps)) if t.warmup else 0
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=t.learning_rate,
    warmup_steps=warmup,
    decay_steps=max(t.steps, warmup + 1),
    end_value=t.final_learning_rate * t.learning_rate,
  )


def make_rules(config: Config, params: Any, dense: Any) -> list[Rule]:
  """Returns the pruning rules of a resolved config; none if it prunes nothing.

  Args:
    config: The resolved configuration.
    params: Tree of parameters, or of their shapes, before any shrink.
    dense: The same for the dense twin, which `overall` refers to.

  Raises:
    ConfigError: no fraction of the prunable parameters reaches `overall`, or
      `exclude` matches nothing, or a part of a neuron and not the whole.
  """
  f = config.fpp
  linear, embedding = f.linear or 0.0, f.embedding or 0.0
  if f.overall is not None:
    linear, embedding = _fractions_for(config, params, dense)
  return _rules(config, params, linear, embedding)


def _rules(
  config: Config, params: Any, linear: float, embedding: float
) -> list[Rule]:
  f = config.fpp
  names = list(paths.flatten(params))
  rules = []
  except_, excluded = "", []
  if f.exclude is not None:
    try:
      excluded = paths.matching(f.exclude, names)
    except ValueError as error:
      raise ConfigError(f"fpp.exclude: {error}") from None
    # By name, as groups and flags of `exclude` would not fit into a pattern.
    except_ = rf"(?!(?:{'|'.join(map(re.escape, excluded))})$)"
  by_layer = {r"\d+": linear}
  if f.linear_layers is not None:
    by_layer = {str(n): part for n, part in enumerate(f.linear_layers)}
  # Units tie arrays together; what is left of the group goes by weight.
  kind = "weight" if f.granularity == "neuron" else f.granularity
  roles = "[qkvo]" if f.attention == "all" else "o"
  mlp, attn = "mlp/(up|gate|down)", f"attn/{roles}"
  of_head = {rf"\1/{role}/kernel": 1 for role in "qkv"}
  if config.model.qkv_bias:
    of_head |= {rf"\1/{role}/bias": 0 for role in "qkv"}
  tied = {r"\1/down/kernel": 0}
  if config.model.use_bias:
    tied[r"\1/up/bias"] = 0
  if config.model.gated:
    tied[r"\1/gate/kernel"] = 1
    if config.model.use_bias:
      tied[r"\1/gate/bias"] = 0
  for layer, part in by_layer.items():
    block = f"blocks_{layer}"
    by_weight = [attn, mlp]
    if f.granularity == "neuron":
      up = f"({block}/mlp)/up/kernel"
      rules.append(Rule(except_ + up, part, "neuron", tied))
      by_weight.remove(mlp)
    if f.attention == "heads":
      o = f"({block}/attn)/o/kernel"
      rules.append(Rule(except_ + o, part, "row", of_head))
      by_weight.remove(attn)
    if by_weight:
      pattern = f"{block}/({'|'.join(by_weight)})/kernel"
      rules.append(Rule(except_ + pattern, part, kind))
  if config.task == "lm" and not config.model.tie_embeddings:
    rules.append(Rule(except_ + "head/kernel", linear))
  rules = [rule for rule in rules if rule.target]
  if embedding:
    unit, score = "row", f.embedding_score
    pattern = _TOKENS  # a row of the positions is no token
    if f.embedding_granularity != "weight":
      score = score or "activation"  # how common each token is
    else:
      unit, pattern = "weight", f"({_TOKENS}|position_embed/embedding)"
      # Where it is the output layer too, each token has a gradient at each step.
      tied = config.task == "lm" and config.model.tie_embeddings
      tells = f.score == "saliency" and tied
      if score is None and SCORES[f.score].evidence and not tells:
        score = "magnitude"
    rules.append(Rule(except_ + pattern, embedding, unit, score=score))
  # `exclude` may leave a rule nothing to prune.
  rules = [r for r in rules if any(re.fullmatch(r.pattern, n) for n in names)]
  try:
    sites = make_sites(rules, params)
  except ValueError as error:  # a rule does not fit the parameters
    raise ConfigError(str(error)) from error
  for site in sites:
    for member in site.members:
      if member in excluded:
        unit, whole, less = "neuron", "MLP", "prune by weight"
        if rules[site.rule].granularity == "row":
          unit, whole, less = "head", "attention", "use fpp.attention='output'"
        raise ConfigError(
          f"fpp.exclude matches {member!r}, which is pruned by {unit} with "
          f"{site.name!r}; exclude the whole {whole}, or {less}"
        )
  return rules


def embedding_fraction(rules: list[Rule]) -> float:
  """Returns what the rules prune of the tokens' embedding."""
  found = (r.target for r in rules if re.fullmatch(r.pattern, _TOKENS))
  return next(found, 0.0)


def _fractions_for(
  config: Config, params: Any, dense: Any
) -> tuple[float, float]:
  """Returns what to prune so that the whole is `overall` smaller.

  With P parameters, of which L in linear layers and E in embeddings can be
  pruned, and T in the dense twin, linear layers keep k and embeddings k**s, s
  their share: P - (1 - k) L - (1 - k**s) E = (1 - overall) T.
  """
  f = config.fpp
  overall, share = f.overall, f.embedding_share
  assert overall is not None and share is not None
  leaves = paths.flatten(params)
  total = sum(math.prod(x.shape) for x in paths.flatten(dense).values())
  stored = sum(math.prod(x.shape) for x in leaves.values())
  # What is pruned, at any fraction.
  sites = make_sites(_rules(config, params, 0.5, 0.5 * (share > 0)), params)
  linear = embedding = 0
  for name in (name for site in sites for name in site.members):
    if group_of(name) == "embedding":
      embedding += math.prod(leaves[name].shape)
    else:
      linear += math.prod(leaves[name].shape)
  needed = stored - (1 - overall) * total
  if needed >= linear + embedding and needed > 0:
    raise ConfigError(
      f"fpp.overall {overall} cannot be reached: only {linear + embedding:,} "
      f"of {stored:,} parameters can be pruned; fold more or ask for less"
    )
  low, high = 0.0, 1.0
  while low < (kept := (low + high) / 2) < high:
    pruned = (1 - kept) * linear + (1 - kept**share) * embedding
    low, high = (kept, high) if pruned > needed else (low, kept)
  most = math.nextafter(1, 0)  # rounding may make it all of them
  return min(1 - high, most), min(1 - high**share, most)


def check_steps(config: Config) -> tuple[int, int, int]:
  """Returns (begin, end, every) in steps."""
  if is_pruned_before(config):
    return 0, 0, 1
  f, steps = config.fpp, config.train.steps
  begin = int(f.begin * steps)
  end = max(begin, min(int(f.end * steps), steps - 1))
  return begin, end, max(1, math.ceil((end - begin) / f.checks))


def is_pruned_before(config: Config) -> bool:
  """Returns whether training starts from pruned weights.

  Then FPP has one check, at the first step, and finds what is to stay zero: what
  is zero already, the lowest by magnitude, and where that is a few less than its
  target (Wanda rounds down in each row) the next.
  """
  return config.compress.prune != "none"


def is_check(config: Config, step: int) -> bool:
  """Returns whether FPP looks at the parameters in this step."""
  begin, end, every = check_steps(config)
  return begin <= step <= end and (step - begin) % every == 0


def removed_units(rules: list[Rule], before: Any, after: Any) -> dict[str, int]:
  """Returns {parameter that a rule matches: units that a shrink removed}.

  Args:
    rules: For the parameters before.
    before: Tree of parameters, or of their shapes.
    after: The same after the shrink.
  """
  sizes = {s.name: math.prod(s.shape) for s in make_sites(rules, after)}
  return {
    s.name: math.prod(s.shape) - sizes[s.name]
    for s in make_sites(rules, before)
  }


def make_optimizer(
  config: Config, rules: list[Rule], removed: dict[str, int] | None = None
) -> optax.GradientTransformationExtraArgs:
  """Returns the chain: FPP around (clip by norm, AdamW, schedule, rates).

  The clip is inside, so that frozen parameters do not count in the norm; FPP
  is outside, so that weight decay and momentum do not move them. Weight decay
  acts on matrices, not on norms, biases, slopes and a BERT's pooler.

  Args:
    config: The resolved configuration.
    rules: What to prune.
    removed: From `removed_units`; None: nothing was.
  """
  t = config.train
  inner = optax.chain(
    optax.clip_by_global_norm(t.clip_norm),
    optax.adamw(
      make_schedule(config),
      b1=t.b1,
      b2=t.b2,
      weight_decay=t.weight_decay,
      mask=lambda params: paths.map_named(
        lambda name, _: group_of(name) != "other", params
      ),
    ),
    optax.stateless(
      lambda updates, _: paths.map_named(
        lambda name, update: rate(config, name) * update, updates
      )
    ),
  )
  begin, end, every = check_steps(config)
  f = config.fpp
  if is_pruned_before(config):
    f = dataclasses.replace(f, score="magnitude", patience=0, tolerance=None)
    rules = [dataclasses.replace(rule, score=None) for rule in rules]
  return fpp(
    inner,
    rules,
    begin=begin,
    end=end,
    every=every,
    patience=f.patience,
    score=f.score,
    decay=f.decay,
    tolerance=f.tolerance if rules else None,
    seed=config.seed,
    removed=removed,
  )


def rate(config: Config, name: str) -> float:
  """Returns what the learning rate of a parameter is multiplied by.

  Args:
    config: The resolved configuration.
    name: Path of the parameter.
  """
  t = config.train
  if found := re.match(r"blocks_(\d+)/attn/(q|k|v|log_slopes)\b", name):
    layer = layers_of(config.model, config.fold)[int(found[1])]
    if found[2] == "log_slopes":
      return t.slope_rate
    if found[2] == "v":
      return t.v_rate if layer.v_block == 1 else 1.0
    return t.qk_rate if layer.groups else 1.0
  return 1.0


def current_rate(config: Config, step: int) -> float:
  """Returns the learning rate of a step, counted from 0, for logs."""
  return float(jax.device_get(make_schedule(config)(step)))
