"""The typed configuration of a run: every field, default and check, once.

A config file returns a `Config`; flags override single fields; `resolve` fills
in what a preset decides, and checks. All defaults are here. It imports no jax.
"""

import dataclasses
import json
import os
from typing import Any, Literal

from folding import checks, files, presets, schema
from folding.schema import PerLayer

Task = Literal["lm", "classify"]
TEXT_ENDINGS = (".txt", ".tsv", ".csv", ".jsonl")  # of local files
Preset = Literal["none", "moderate", "paper"]
Score = Literal[
  "relative",
  "activation",
  "magnitude",
  "saliency",
  "movement",
  "random",
]


@dataclasses.dataclass(slots=True)  # so that a misspelt field is told of
class DataConfig:
  """Where text comes from and how it becomes batches."""

  name: str = "python_stdlib"  # "python_stdlib" or any TFDS name ("glue/sst2")
  path: str | None = None  # a local file or folder; wins over `name`
  dir: str | None = None  # where TFDS keeps prepared data; None: its default
  text_field: str | None = None  # None: "text", "sentence" or the only one
  label_field: str | None = None  # None: "label"; of TFDS else a class label
  valid_fraction: float = 0.1  # for sources without a validation split
  test_fraction: float = 0.1  # for sources without a test split
  tokenizer: str = "bpe"  # "bytes", "bpe", or the path of a tokenizer.json
  vocab_size: int = 1024  # of a BPE that is trained; others bring their own
  length: int = 128  # L, tokens of an example; longer texts are cut or packed
  batch_size: int = 32  # B, examples over all processes
  eval_batch_size: int = 64
  max_bytes: int | None = None  # of train; valid, test: an eighth; None: all
  first_batch: int = 0  # where a run begins that goes on from another's end
  prefetch_batches: int = 2  # prepared ahead by a thread; 0: none


def data_at(name: str, **fields: Any) -> DataConfig:
  """Returns the configuration of a local path, or else of a data set's name.

  A path is where something is, or what starts with "." or "/" or ends as texts do.
  """
  is_path = name.startswith((".", "/")) or name.endswith(TEXT_ENDINGS)
  if is_path or os.path.exists(name):
    return DataConfig(path=name, **fields)
  return DataConfig(name=name, **fields)


@dataclasses.dataclass(slots=True, unsafe_hash=True)  # static in jit
class ModelConfig:
  """Shape of the transformer. Letters as in `folding.models`."""

  num_layers: int = 4  # N
  width: int = 128  # D
  num_heads: int = 16  # H
  num_kv_heads: int = 0  # J; 0: as many as heads
  head_dim: int = 0  # K; 0: width / num_heads
  mlp_width: PerLayer = 0  # F; 0: 4 D
  dense_mlp_width: PerLayer | None = None  # before a shrink; None: mlp_width
  heads: tuple[tuple[int, ...], ...] | None = None  # kept by layer; None: all
  causal: bool = True
  norm: Literal["layernorm", "rmsnorm"] = "layernorm"
  norm_position: Literal["pre", "post"] = "pre"
  norm_epsilon: float = 1e-5
  positions: Literal["alibi", "learned", "rope", "none"] = "alibi"
  rope_base: float = 10000.0
  # Slows rotations down by a factor: (factor,) all of them; Llama 3's (factor,
  # low, high, length) those of fewer than low turns in length tokens, those of
  # more than high not, and those between by a share. None: none.
  rope_scaling: tuple[float, ...] | None = None
  window: int | None = None  # attend to the last so many tokens; None: to all
  # Linear in the length, in layers of fold.groups=1 (see `linear_attention`);
  # then an output depends on later tokens by up to 1e-4.
  attention: Literal["dense", "linear"] = "dense"
  activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
  gated: bool = False  # multiply the MLP's hidden state by a gate
  use_bias: bool = True
  qkv_bias: bool | None = None  # of W_Q, W_K, W_V; None: as use_bias
  tie_embeddings: bool = True  # the output layer is the embedding, transposed
  pooling: Literal["mean", "first", "last"] = "mean"  # classification only
  pooler: bool = False  # a dense layer between pooling and head, and then
  pooler_activation: Literal["tanh", "relu"] = "tanh"
  dropout: float = 0.0
  remat: bool = False  # recompute blocks in the backward pass
  dtype: Literal["float32", "bfloat16"] = "float32"  # of compute


@dataclasses.dataclass(slots=True, unsafe_hash=True)
class FoldConfig:
  """Folding of the attention projections. None: what the preset says."""

  groups: PerLayer | None = None  # G, row groups of W_Q and W_K; 0: dense
  axis: Literal["output", "input"] = "output"  # which axis the groups run over
  rope: Literal["copy", "pairs"] = "copy"  # G copied to K, or G/2 pairs
  v_block: PerLayer | None = None  # block size of W_V; 1: DWC; 0: dense
  v_identity: bool = False  # blocks of size 1 are 1: W_O has absorbed them
  first_dense: bool = False  # keep W_V of the first layer dense


@dataclasses.dataclass(slots=True)
class FPPConfig:
  """Forward Propagation Pruning. None: what the preset says.

  `overall`, where set, replaces `linear` and `embedding`: linear layers keep the
  k, and embeddings the k**embedding_share, that make the whole that much smaller.
  """

  linear: float | None = None  # fraction of W_O, MLP and output head to zero
  linear_layers: tuple[float, ...] | None = None  # of W_O and MLP, by layer
  embedding: float | None = None  # fraction of embeddings to zero
  overall: float | None = None  # fraction of the whole model to save
  embedding_share: float | None = None  # of overall; None: 0.2 lm, 1 classify
  score: Score = "relative"
  # Of embeddings. None: of rows "activation", how common a token is; of weights as
  # `score`, but "magnitude" where that tells how common it is, and so would empty
  # rare ones ("saliency" does not where the embedding is the output layer too).
  embedding_score: Score | None = None
  granularity: Literal["weight", "neuron"] = "weight"  # of the MLP
  # Of attention: W_O, all four matrices (by weight), or whole heads.
  attention: Literal["output", "all", "heads"] = "output"
  # Of a classifier's tokens, rows of the embedding: "row", zero them; "trim", of a
  # trained one: take them out of the tokenizer, which cuts words into others.
  embedding_granularity: Literal["weight", "row", "trim"] = "weight"
  begin: float = 0.45  # of the steps: first check
  end: float = 0.9  # of the steps: target reached, masks fixed, healing begins
  checks: int = 30  # at most, after a first one at begin
  patience: int = 1  # checks an element stays suspected before it is zeroed
  decay: float = 0.9  # of the running averages behind the scores
  tolerance: float | None = None  # verify: most relative loss a check may add
  exclude: str | None = None  # pattern of parameters to leave alone


@dataclasses.dataclass(slots=True)
class CompressConfig:
  """How trained weights are folded; only of a run with `pretrained`."""

  plan: Literal["same", "auto"] = "same"  # auto: each layer by what it loses
  qkv: float | None = None  # of a plan: least fraction of W_Q, W_K, W_V saved
  # Prune to what fpp says before the first step, and then train what is left.
  prune: Literal["none", "magnitude", "wanda", "sparsegpt"] = "none"
  calibration: int = 512  # texts (or windows) that it is done on
  fit_steps: int = 300  # that fit folded attention to the dense one, a layer


@dataclasses.dataclass(slots=True)
class DistillConfig:
  """Learning from a dense teacher; a weight of 0 leaves that part out."""

  # A run or a checkpoint. None: as `pretrained`, or, of a dense run, none.
  teacher: str | None = None
  logits: float = 0.0  # share of the loss that is the teacher's, 0 to 1
  temperature: float = 2.0  # that both are softened by
  hidden: float = 0.0  # weight of the distance of what the layers write


@dataclasses.dataclass(slots=True)
class TrainConfig:
  """Optimizer, schedule, and what is logged and kept."""

  steps: int = 1000
  accumulate: int = 1  # parts of a batch that are computed one after another
  learning_rate: float = 3e-3  # peak
  warmup: float = 0.05  # of the steps
  final_learning_rate: float = 0.05  # of the peak, where the cosine ends
  # The learning rate is multiplied by these; see docs/method.md.
  qk_rate: float = 1.0  # of W_Q and W_K where they are folded
  v_rate: float = 1.0  # of W_V where it is diagonal
  slope_rate: float = 1.0  # of ALiBi's slopes, dense or folded
  weight_decay: float = 0.05
  b1: float = 0.9
  b2: float = 0.98
  clip_norm: float = 1.0
  label_smoothing: float = 0.0
  log_every: int = 20
  eval_every: int = 200  # a checkpoint is saved each time
  eval_batches: int | None = None  # of valid, while training; None: all
  tensorboard: bool = True
  energy: str = ""  # country (ISO 3166, three letters) for an estimate


@dataclasses.dataclass(slots=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left over."""

  data: int = -1  # splits batches
  fsdp: int = 1  # splits batches, parameters and all that is shaped like them
  tensor: int = 1  # splits heads, neurons and the vocabulary
  # (pattern of parameter paths, mesh axis or None for each array axis): where
  # these parameters lie. The first match counts; others lie as by default.
  rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()


@dataclasses.dataclass(slots=True)
class Config:
  """A run. `resolve` it before use."""

  task: Task = "lm"
  seed: int = 0
  # Processes that train together: "auto" (a TPU pod, SLURM, Open MPI), or
  # "HOST:PORT,PROCESS,COUNT" with the address of process 0.
  distributed: str = "none"
  preset: Preset = "paper"
  dense: bool = False  # the dense twin: nothing folded, nothing pruned
  # Checkpoint folder, hub id or run to start from.
  pretrained: str | None = None
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  fold: FoldConfig = dataclasses.field(default_factory=FoldConfig)
  fpp: FPPConfig = dataclasses.field(default_factory=FPPConfig)
  compress: CompressConfig = dataclasses.field(default_factory=CompressConfig)
  distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
  """The shape of one layer of a resolved config; `layers_of` returns these.

  Attributes:
    heads: Indices of the heads that a shrink has kept, in increasing order.
    num_kv_heads: J, of those that are kept.
    head_dim: K.
    mlp_width: F.
    qkv_bias: Whether W_Q, W_K and W_V have a bias.
    groups: G, row groups of W_Q and W_K; 0: dense.
    axis: As `FoldConfig.axis`.
    rope: As `FoldConfig.rope`.
    v_block: Block size of W_V; 1: diagonal; 0: dense.
    v_identity: Whether blocks of size 1 are 1 and have no parameters.
  """

  heads: tuple[int, ...]
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  qkv_bias: bool
  groups: int
  axis: Literal["output", "input"]
  rope: Literal["copy", "pairs"]
  v_block: int
  v_identity: bool


def gpt2(**fields: Any) -> ModelConfig:
  """Returns a GPT-2 style decoder: pre-norm, learned positions, GELU."""
  base: dict[str, Any] = {"positions": "learned", "activation": "gelu_tanh"}
  return ModelConfig(**(base | fields))


def bert(**fields: Any) -> ModelConfig:
  """Returns a BERT style encoder: post-norm, learned positions, GELU."""
  base: dict[str, Any] = {
    "causal": False,
    "norm_position": "post",
    "norm_epsilon": 1e-12,
    "positions": "learned",
    "pooling": "first",
  }
  return ModelConfig(**(base | fields))


def llama(**fields: Any) -> ModelConfig:
  """Returns a Llama style decoder: RMSNorm, RoPE, gated SiLU, no biases."""
  base: dict[str, Any] = {
    **{"norm": "rmsnorm", "positions": "rope", "activation": "silu"},
    **{"gated": True, "use_bias": False, "tie_embeddings": False},
  }
  return ModelConfig(**(base | fields))


def resolve(config: Config) -> Config:
  """Returns a copy with presets and shapes filled in, and checks it.

  Raises:
    schema.ConfigError: a value is of the wrong type or range, or two do not fit.
  """
  c = from_dict(to_dict(config))
  if c.dense:
    c.preset, c.fold, c.fpp = "none", FoldConfig(), FPPConfig(score=c.fpp.score)
    if c.distill.teacher is None:  # it would be what is not trained yet
      c.distill = DistillConfig()
  parts = (c.fpp.linear, c.fpp.embedding, c.fpp.linear_layers)
  by_part = any(part is not None for part in parts)
  for section, values in presets.PRESETS[c.preset].items():
    holder = getattr(c, section)
    for name, value in values.items():
      if name == "overall" and by_part:
        continue  # it would replace what was asked for
      if getattr(holder, name) is None:
        setattr(holder, name, value)
  if c.model.num_kv_heads == 0:
    c.model.num_kv_heads = c.model.num_heads
  if c.model.head_dim == 0:
    c.model.head_dim = c.model.width // max(1, c.model.num_heads)
  if c.model.mlp_width == 0:
    c.model.mlp_width = 4 * c.model.width
  if c.model.qkv_bias is None:
    c.model.qkv_bias = c.model.use_bias
  if c.fpp.embedding_share is None:
    c.fpp.embedding_share = 0.2 if c.task == "lm" else 1.0
  if c.data.path is not None and not c.data.name:
    c.data.name = DataConfig().name  # does not count then: no difference
  checks.check(c)
  return c


def layers_of(model: ModelConfig, fold: FoldConfig) -> tuple[Layer, ...]:
  """Returns the shape of each layer.

  Args:
    model: Resolved.
    fold: Resolved.

  Raises:
    ValueError: the config is not resolved.
  """
  m, f = model, fold
  if m.qkv_bias is None or f.groups is None or f.v_block is None:
    raise ValueError(
      "the config is not resolved; use folding.config.resolve(config)"
    )

  def at(value: Any, n: int) -> Any:
    return value[n] if isinstance(value, tuple) else value

  layers = []
  for n in range(m.num_layers):
    heads = m.heads[n] if m.heads else tuple(range(m.num_heads))
    layers.append(
      Layer(
        heads=heads,
        num_kv_heads=len(heads) * m.num_kv_heads // m.num_heads,
        head_dim=m.head_dim,
        mlp_width=at(m.mlp_width, n),
        qkv_bias=m.qkv_bias,
        groups=at(f.groups, n),
        axis=f.axis,
        rope=f.rope,
        v_block=0 if f.first_dense and n == 0 else at(f.v_block, n),
        v_identity=f.v_identity,
      )
    )
  return tuple(layers)


def unshrunk(config: Config) -> Config:
  """Returns the config with all heads and neurons, as before any shrink."""
  m = config.model
  width = m.mlp_width if m.dense_mlp_width is None else m.dense_mlp_width
  model = dataclasses.replace(
    m, mlp_width=width, dense_mlp_width=None, heads=None
  )
  fold = dataclasses.replace(config.fold, v_identity=False)
  return dataclasses.replace(config, model=model, fold=fold)


def dense_twin(config: Config) -> Config:
  """Returns the resolved config of the same run with nothing compressed."""
  return resolve(dataclasses.replace(unshrunk(config), dense=True))


def to_dict(config: Config) -> dict[str, Any]:
  """Returns the config as nested plain dicts, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Builds a `Config` from nested dicts, checking names and types.

  Raises:
    schema.ConfigError: a name is unknown or a value is of the wrong type.
  """
  return schema.build(Config, values, "config")


def load(path: str) -> Config:
  """Reads a config that `save` wrote."""
  return from_dict(files.read_json(path, dict))


def save(config: Config, path: str) -> None:
  """Writes a config as JSON, whole or not at all."""
  files.write_file(path, json.dumps(to_dict(config), indent=2) + "\n")
