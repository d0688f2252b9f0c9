"""The optimizer chain and the pruning rules of a configuration."""

import math
import re
from typing import Any

import jax
import optax

from folding import paths
from folding.compression.accounting import group_of
from folding.compression.fpp import fpp
from folding.compression.rules import Rule, make_sites
from folding.config import Config
from folding.schema import ConfigError

_LINEAR = r"blocks_\d+/(attn/o|mlp/(up|gate|down))/kernel"
_EMBEDDING = r"(embed|position_embed)/embedding"


def make_schedule(config: Config) -> optax.Schedule:
  """Returns linear warm-up, then a cosine to a fraction of the peak."""
  t = config.train
  warmup = max(1, round(t.warmup * t.steps))
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
    params: Tree of parameters, or of their shapes.
    dense: The same for the dense twin, which `overall` refers to.

  Raises:
    ConfigError: no fraction of the prunable parameters reaches `overall`, or
      `exclude` matches nothing, or a part of a neuron and not the whole.
  """
  f = config.fpp
  linear, embedding = f.linear or 0.0, f.embedding or 0.0
  if f.overall is not None:
    linear = embedding = _fraction_for(config, params, dense)
  return _rules(config, params, linear, embedding)


def _rules(
  config: Config, params: Any, linear: float, embedding: float
) -> list[Rule]:
  f = config.fpp
  names = list(paths.flatten(params))
  rules = []
  pattern = _LINEAR
  if config.task == "lm" and not config.model.tie_embeddings:
    pattern = rf"(?:{_LINEAR}|head/kernel)"
  except_, excluded = "", []
  if f.exclude is not None:
    try:
      excluded = paths.matching(f.exclude, names)
    except ValueError as error:
      raise ConfigError(f"fpp.exclude: {error}") from None
    # By name, as groups and flags of `exclude` would not fit into a pattern.
    except_ = rf"(?!(?:{'|'.join(map(re.escape, excluded))})$)"
  if linear and f.granularity == "weight":
    rules.append(Rule(except_ + pattern, linear))
  elif linear:
    # Neurons carry the MLP; what is left of the group goes by weight.
    tied = {r"\1/down/kernel": 0}
    if config.model.use_bias:
      tied[r"\1/up/bias"] = 0
    if config.model.gated:
      tied[r"\1/gate/kernel"] = 1
      if config.model.use_bias:
        tied[r"\1/gate/bias"] = 0
    up = r"(blocks_\d+/mlp)/up/kernel"
    rules.append(Rule(except_ + up, linear, "neuron", tied))
    rest = pattern.replace("(attn/o|mlp/(up|gate|down))", "attn/o")
    rules.append(Rule(except_ + rest, linear))
  if embedding:
    kind = f.embedding_granularity
    rules.append(Rule(except_ + _EMBEDDING, embedding, kind))
  # `exclude` may leave a rule nothing to prune.
  rules = [r for r in rules if any(re.fullmatch(r.pattern, n) for n in names)]
  for site in make_sites(rules, params):
    for member in site.members:
      if member in excluded:
        raise ConfigError(
          f"fpp.exclude matches {member!r}, which is pruned by neuron with "
          f"{site.name!r}; exclude the whole MLP, or prune by weight"
        )
  return rules


def _fraction_for(config: Config, params: Any, dense: Any) -> float:
  """Returns the fraction to prune so that the whole is `overall` smaller.

  With P parameters of which S can be pruned, and T in the dense twin:
  P - fraction S = (1 - overall) T.
  """
  overall = config.fpp.overall
  assert overall is not None
  leaves = paths.flatten(params)
  total = sum(math.prod(x.shape) for x in paths.flatten(dense).values())
  stored = sum(math.prod(x.shape) for x in leaves.values())
  trial = _rules(config, params, 0.5, 0.5)  # what is pruned, at any fraction
  prunable = sum(
    math.prod(leaves[name].shape)
    for site in make_sites(trial, params)
    for name in site.members
  )
  needed = stored - (1 - overall) * total
  if needed >= prunable and needed > 0:
    raise ConfigError(
      f"fpp.overall {overall} cannot be reached: only {prunable:,} of "
      f"{stored:,} parameters can be pruned; fold more or ask for less"
    )
  return max(0.0, needed / max(prunable, 1))


def check_steps(config: Config) -> tuple[int, int, int]:
  """Returns (begin, end, every) in steps."""
  f, steps = config.fpp, config.train.steps
  begin = int(f.begin * steps)
  end = max(begin, min(int(f.end * steps), steps - 1))
  return begin, end, max(1, math.ceil((end - begin) / f.checks))


def is_check(config: Config, step: int) -> bool:
  """Returns whether FPP looks at the parameters in this step."""
  begin, end, every = check_steps(config)
  return begin <= step <= end and (step - begin) % every == 0


def make_optimizer(
  config: Config, rules: list[Rule]
) -> optax.GradientTransformationExtraArgs:
  """Returns the chain: FPP around (clip by norm, AdamW, schedule).

  The clip is inside, so that frozen parameters do not count in the norm; FPP
  is outside, so that weight decay and momentum do not move them. Weight decay
  acts on matrices, not on norms, biases and slopes.
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
  )
  begin, end, every = check_steps(config)
  f = config.fpp
  return fpp(
    inner,
    rules,
    begin=begin,
    end=end,
    every=every,
    patience=f.patience,
    score=f.score,
    scope=f.scope,
    decay=f.decay,
    tolerance=f.tolerance if rules else None,
    seed=config.seed,
  )


def current_rate(config: Config, step: int) -> float:
  """Returns the learning rate of a step, counted from 0, for logs."""
  return float(jax.device_get(make_schedule(config)(step)))
