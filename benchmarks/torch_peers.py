"""Pruning by libraries of PyTorch, recovered exactly as one of our runs.

Both start from the dense model of the run, keep at most as many parameters, and
train on the same batches for as many steps with the dense model as teacher:

- `torch.nn.utils.prune`: single weights of linear layers and of the embedding by
  magnitude, the same share of each;
- Torch-Pruning (Fang et al. 2023, arXiv:2301.12900): whole channels, of the width
  as well. Its layers have another width than the teacher's, so it learns from
  the teacher's logits only.

They are pruned in `STAGES` stages while our run pruned.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import exports
from folding import config as config_lib
from folding.data.batches import Data
from folding.training.optimizer import make_schedule, mask_updates

STAGES = 10


class Pruned(NamedTuple):
  """A model that is pruned stage by stage.

  Attributes:
    model: A model of `transformers`.
    advance: Prunes it as far as the next stage.
    finish: Makes the zeros permanent, after the last stage.
    is_same_shape: Whether hidden states have the shape of the teacher's.
  """

  model: Any
  advance: Callable[[], None]
  finish: Callable[[], None]
  is_same_shape: bool


def by_magnitude(model: Any, target: int, length: int) -> Pruned:
  """Prunes the same share of each matrix by magnitude.

  Args:
    model: A model of `transformers`; changed in place.
    target: Number of nonzero parameters to keep, at most.
    length: Unused.
  """
  from torch import nn
  from torch.nn.utils import prune

  del length
  bert = model.base_model
  parts = [bert.embeddings.word_embeddings]
  parts += [m for m in bert.encoder.modules() if isinstance(m, nn.Linear)]
  total = sum(p.numel() for p in model.parameters())
  share = (total - target) / sum(m.weight.numel() for m in parts)
  if not 0 < share < 1:
    raise ValueError(f"{target:,} parameters are not a part of these layers")
  done = 0

  def advance():
    nonlocal done
    done += 1
    # The cubic ramp of FPP. Each call adds to what is pruned.
    goal = share * (1 - (1 - done / STAGES) ** 3)
    for m in parts:
      so_far = int((m.weight_mask == 0).sum()) if prune.is_pruned(m) else 0
      more = int(np.ceil(goal * m.weight.numel())) - so_far
      prune.l1_unstructured(m, "weight", amount=more)

  def finish():
    for m in parts:
      prune.remove(m, "weight")

  return Pruned(model, advance, finish, is_same_shape=True)


def by_channel(model: Any, target: int, length: int) -> Pruned:
  """Prunes the same share of the channels everywhere by Torch-Pruning.

  Args:
    model: A model of `transformers`; changed in place.
    target: Number of parameters to keep, at most.
    length: Sequence length that the library traces the model with.
  """
  low, high = 0.0, 0.95
  for _ in range(8):
    share = (low + high) / 2
    tried = copy.deepcopy(model)
    _channel_pruner(tried, share, length, 1)()
    size = sum(p.numel() for p in tried.parameters())
    low, high = (share, high) if size > target else (low, share)
  advance = _channel_pruner(model, high, length, STAGES)
  return Pruned(model, advance, lambda: None, is_same_shape=False)


def _channel_pruner(
  model: Any, share: float, length: int, stages: int
) -> Callable[[], None]:
  """Returns a function that prunes a share of the channels in some calls."""
  import torch
  import torch_pruning

  ids = torch.ones((2, length), dtype=torch.long)
  inputs: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
  attentions = [
    layer.attention.self for layer in model.base_model.encoder.layer
  ]
  pruner = torch_pruning.pruner.BasePruner(
    model,
    inputs,
    importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
    pruning_ratio=share,
    iterative_steps=stages,
    ignored_layers=[model.classifier],
    num_heads={
      projection: a.num_attention_heads
      for a in attentions
      for projection in (a.query, a.key, a.value)
    },
    prune_head_dims=True,
    output_transform=lambda out: out.logits.sum(),
  )

  def advance():
    pruner.step()
    for a in attentions:  # sizes that `transformers` keeps beside the arrays
      a.all_head_size = a.query.out_features
      a.attention_head_size = a.all_head_size // a.num_attention_heads
      a.scaling = a.attention_head_size**-0.5

  return advance


def prune_and_recover(
  dense: Any,
  make: Callable[[Any, int, int], Pruned],
  target: int,
  *,
  config: config_lib.Config,
  data: Data,
  rates: Sequence[float],
) -> Any:
  """Returns the model that is best in validation over peak learning rates.

  Args:
    dense: The dense model of `transformers`, also the teacher.
    make: `by_magnitude` or `by_channel`.
    target: Number of parameters to keep, at most.
    config: The config of our run: steps, schedule, pruning window, teacher.
    data: The data of our run.
    rates: Peak learning rates to try.
  """
  tried = []
  for rate in rates:
    pruned = make(copy.deepcopy(dense), target, config.data.length)
    _recover(pruned, dense, config=config, data=data, learning_rate=rate)
    pruned.finish()
    tried.append((accuracy(pruned.model, data, "valid"), pruned.model))
  return max(tried, key=lambda one: one[0])[1]


def _recover(
  pruned: Pruned,
  teacher: Any,
  *,
  config: config_lib.Config,
  data: Data,
  learning_rate: float,
) -> None:
  """Trains a model while it is pruned, as the run of a config was."""
  import torch

  t = dataclasses.replace(config.train, learning_rate=learning_rate)
  d = config.distill
  updates = mask_updates(config)
  stages = (
    np.linspace(updates.start, updates.stop - 1, STAGES)
    .round()
    .astype(int)
    .tolist()
  )
  schedule = make_schedule(t)

  def make_optimizer():
    return torch.optim.AdamW(
      pruned.model.parameters(),
      betas=(t.b1, t.b2),
      weight_decay=t.weight_decay,
    )

  optimizer = make_optimizer()
  for step in range(t.steps):
    batch = data.train_batch(step)
    inputs = _inputs(batch["tokens"], batch["mask"])
    labels = torch.as_tensor(batch["labels"], dtype=torch.long)
    for _ in range(stages.count(step)):  # several, in a short run
      pruned.advance()
      if not pruned.is_same_shape:
        optimizer = make_optimizer()  # of the new arrays
    for group in optimizer.param_groups:
      group["lr"] = float(np.asarray(schedule(step)))
    out = pruned.model(**inputs, output_hidden_states=True)
    with torch.no_grad():
      taught = teacher(**inputs, output_hidden_states=True)
    loss = (1 - d.logits) * torch.nn.functional.cross_entropy(
      out.logits, labels
    )
    soft = [(x.logits / d.temperature).log_softmax(-1) for x in (out, taught)]
    nats = (soft[1].exp() * (soft[1] - soft[0])).sum(-1).mean()
    loss = loss + d.logits * d.temperature**2 * nats
    if pruned.is_same_shape:
      keep = inputs["attention_mask"][..., None]
      pairs = zip(out.hidden_states[1:], taught.hidden_states[1:], strict=True)
      shares = [
        ((a - b) ** 2 * keep).sum() / (b**2 * keep).sum() for a, b in pairs
      ]
      loss = loss + d.hidden * torch.stack(shares).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pruned.model.parameters(), t.clip_norm)
    optimizer.step()


def accuracy(model: Any, data: Data, split: str = "test") -> float:
  """Returns the accuracy of a model of `transformers` on a split."""
  import torch

  @torch.inference_mode()
  def forward(tokens, mask):
    return model(**_inputs(tokens, mask)).logits.numpy()

  return exports.accuracy(forward, data, split)


def _inputs(tokens: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
  """Returns the arguments of a model of `transformers`."""
  import torch

  arrays = {"input_ids": tokens, "attention_mask": mask}
  return {k: torch.as_tensor(x, dtype=torch.long) for k, x in arrays.items()}
