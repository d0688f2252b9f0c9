"""A trained classifier made smaller by pruning libraries of PyTorch, and by ours.

    python -m benchmarks.peers RUN... [--learning-rates=2e-4,5e-4] [--json]

Needs the extra `parity`. A RUN is a folded run of configs/pretrained.py that
started from a dense run of a BERT. That dense run is exported for
`transformers`, pruned there to at most as many parameters as RUN stores, and
trained on the same batches for as many steps, with the same schedule and with
itself, dense, as teacher; of the peak learning rates what is best in validation counts.
By

- `torch.nn.utils.prune`: single weights of linear layers and of the embedding by
  magnitude, the same share of each, in stages while RUN pruned;
- Torch-Pruning (Fang et al. 2023, arXiv:2301.12900): whole channels, of the
  width as well, in as many stages; as its width is not the teacher's, it learns
  from the teacher's logits alone.
"""

import argparse
import copy
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import output
from folding import config as config_lib
from folding.data.batches import Data, make_data
from folding.data.tokenizers import load_tokenizer
from folding.serving.export import export_hf, load
from folding.training.optimizer import check_steps, make_schedule
from folding.training.run_dir import read_result

STAGES = 10


class Pruned(NamedTuple):
  """A model that is pruned stage by stage.

  Attributes:
    model: Of `transformers`.
    advance: Prunes it as far as the next stage; there are `STAGES`.
    stored: Returns how many parameters it has that are not zero.
    is_same_shape: Whether its layers write what the teacher's write.
  """

  model: Any
  advance: Callable[[], None]
  stored: Callable[[], int]
  is_same_shape: bool


def measure(workdir: str, rates: Sequence[float]) -> dict[str, Any]:
  """Returns test accuracies and stored parameters of a run and its peers.

  Args:
    workdir: Of a folded run.
    rates: Peak learning rates of the peers; what is best in validation counts.
  """
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  config = config_lib.load(os.path.join(workdir, "config.json"))
  ours, source = read_result(workdir), config.pretrained
  assert source is not None, "the run did not start from a dense one"
  tokenizer = load_tokenizer(os.path.join(source, "tokenizer.json"))
  data = make_data(config, tokenizer)
  with tempfile.TemporaryDirectory() as folder:
    export_hf(folder, load(source))
    # It stays in evaluation mode: recovery has no dropout, as the run has none.
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder, attn_implementation="eager"
    ).eval()
  target = ours["parameters"]["overall"]["stored"]
  found = {
    "dense": {
      "test": accuracy(dense, data),
      "stored": sum(p.numel() for p in dense.parameters()),
    },
    "folding": {"test": ours["test"]["accuracy"], "stored": target},
  }
  peers = {
    "torch.nn.utils.prune": by_magnitude,
    "Torch-Pruning": functools.partial(by_channel, length=config.data.length),
  }
  tried = []
  for name, make in peers.items():
    own = []
    for rate in rates:
      pruned = make(copy.deepcopy(dense), target)
      recover(pruned, dense, config, data, rate)
      figures = {
        "valid": accuracy(pruned.model, data, "valid"),
        "test": accuracy(pruned.model, data),
        "stored": pruned.stored(),
      }
      own.append({"peer": name, "learning_rate": rate, **figures})
      print(pathlib.Path(workdir).name, own[-1], flush=True)
    tried += own
    found[name] = max(own, key=lambda each: each["valid"])
  return {"run": pathlib.Path(workdir).name, "found": found, "tried": tried}


def by_magnitude(model: Any, target: int) -> Pruned:
  """Prunes the same share of each matrix by magnitude.

  Args:
    model: Of `transformers`; it is changed.
    target: Parameters to keep, at most.
  """
  from torch import nn
  from torch.nn.utils import prune

  bert = model.base_model
  parts = [bert.embeddings.word_embeddings]
  parts += [m for m in bert.encoder.modules() if isinstance(m, nn.Linear)]
  total = sum(p.numel() for p in model.parameters())
  size = sum(m.weight.numel() for m in parts)
  share = (total - target) / size
  assert 0 < share < 1, "the run stores more, or less than can be pruned"
  done = 0

  def advance():
    nonlocal done
    done += 1
    # A cubic ramp, as FPP's; what a call prunes adds to what is pruned.
    goal = share * (1 - (1 - done / STAGES) ** 3)
    for m in parts:
      so_far = int((m.weight_mask == 0).sum()) if prune.is_pruned(m) else 0
      more = int(np.ceil(goal * m.weight.numel())) - so_far
      prune.l1_unstructured(m, "weight", amount=more)

  def stored():
    zeros = sum(int((m.weight == 0).sum()) for m in parts)
    return total - zeros

  return Pruned(model, advance, stored, is_same_shape=True)


def by_channel(model: Any, target: int, length: int) -> Pruned:
  """Prunes whole channels by Torch-Pruning, the same share everywhere.

  Args:
    model: Of `transformers`; it is changed.
    target: Parameters to keep, at most.
    length: Of texts.
  """
  low, high = 0.0, 0.95
  for _ in range(8):
    share = (low + high) / 2
    tried = copy.deepcopy(model)
    _channel_pruner(tried, share, length, 1)()
    size = sum(p.numel() for p in tried.parameters())
    low, high = (share, high) if size > target else (low, share)
  advance = _channel_pruner(model, high, length, STAGES)
  return Pruned(
    model,
    advance,
    lambda: sum(p.numel() for p in model.parameters()),
    is_same_shape=False,
  )


def _channel_pruner(
  model: Any, share: float, length: int, stages: int
) -> Callable[[], None]:
  """Returns what prunes a share of the channels, by as many calls."""
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
    for a in attentions:  # what `transformers` keeps beside the arrays
      a.all_head_size = a.query.out_features
      a.attention_head_size = a.all_head_size // a.num_attention_heads
      a.scaling = a.attention_head_size**-0.5

  return advance


def recover(
  pruned: Pruned,
  teacher: Any,
  config: config_lib.Config,
  data: Data,
  learning_rate: float,
) -> None:
  """Trains a model while it is pruned, as the run of a config was."""
  import torch

  t = dataclasses.replace(config.train, learning_rate=learning_rate)
  d = config.distill
  begin, end, _ = check_steps(config)
  stages = np.linspace(begin, end, STAGES).round().astype(int).tolist()
  schedule = make_schedule(dataclasses.replace(config, train=t))

  def make_optimizer():
    return torch.optim.AdamW(
      pruned.model.parameters(),
      betas=(t.b1, t.b2),
      weight_decay=t.weight_decay,
    )

  optimizer = make_optimizer()
  for step in range(t.steps):
    inputs, labels, _ = _tensors(data.train_batch(step))
    for _ in range(stages.count(step)):  # several, in a short run
      pruned.advance()
      if not pruned.is_same_shape:
        optimizer = make_optimizer()  # the arrays are others
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
      shares = [
        ((a - b) ** 2 * keep).sum() / (b**2 * keep).sum()
        for a, b in zip(
          out.hidden_states[1:], taught.hidden_states[1:], strict=True
        )
      ]
      loss = loss + d.hidden * torch.stack(shares).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(pruned.model.parameters(), t.clip_norm)
    optimizer.step()


def accuracy(model: Any, data: Data, split: str = "test") -> float:
  """Returns the share of a split that a model of `transformers` gets right."""
  import torch

  right = count = 0.0
  with torch.inference_mode():
    for batch in data.eval_batches(split):
      inputs, labels, weights = _tensors(batch)
      hits = (model(**inputs).logits.argmax(-1) == labels) * weights
      right, count = right + float(hits.sum()), count + float(weights.sum())
  return right / count


def _tensors(
  batch: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], Any, Any]:
  """Returns (inputs, labels, weights) of a batch, for PyTorch."""
  import torch

  inputs = {
    "input_ids": torch.as_tensor(batch["tokens"], dtype=torch.long),
    "attention_mask": torch.as_tensor(batch["mask"], dtype=torch.long),
  }
  labels = torch.as_tensor(batch["labels"], dtype=torch.long)
  return inputs, labels, torch.as_tensor(batch["weights"])


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__)
  parser.add_argument("runs", nargs="+")
  parser.add_argument("--learning-rates", default="2e-4,5e-4")
  args = parser.parse_args()
  rates = [float(text) for text in args.learning_rates.split(",")]
  show([measure(run, rates) for run in args.runs], args)


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
  """Shows what `measure` returned of each run."""
  names = list(rows[0]["found"])
  mean = {
    name: statistics.fmean(row["found"][name]["test"] for row in rows)
    for name in names
  }
  table = output.Table(
    "Test accuracy",
    ["run", *names],
    [
      *(
        [row["run"], *(f"{row['found'][name]['test']:.1%}" for name in names)]
        for row in rows
      ),
      ["mean", *(f"{mean[name]:.1%}" for name in names)],
      [
        "parameters, first run",
        *(f"{rows[0]['found'][name]['stored']:,}" for name in names),
      ],
    ],
  )
  plot = output.Plot(
    "Accuracy over that of the dense model",
    {
      name: {
        row["run"]: {
          "ratio": row["found"][name]["test"] / row["found"]["dense"]["test"]
        }
        for row in rows
      }
      for name in names[1:]
    },
  )
  output.show("peers", args, {"cases": rows}, [table], plot)


if __name__ == "__main__":
  main()
