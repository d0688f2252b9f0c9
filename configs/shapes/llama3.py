"""Shapes of Llama 3: `--config=configs/shapes/llama3.py:SIZE`, 8b or 70b.

For `folding estimate`. To train one, set `--config.data.path` and a tokenizer, too.

Estimate: folding estimate --config=configs/shapes/llama3.py:8b --devices=v5p:4x4x2
"""

from folding import config as c
from folding.errors import ConfigError

_SIZES = {
  "8b": {"num_layers": 32, "width": 4096, "num_heads": 32, "mlp_width": 14336},
  "70b": {"num_layers": 80, "width": 8192, "num_heads": 64, "mlp_width": 28672},
}


def get_config(size: str = "8b") -> c.Config:
  """Returns the configuration of a size; 30% of it is pruned."""
  if size not in _SIZES:
    raise ConfigError(f"the size is one of {', '.join(_SIZES)}; it is {size!r}")
  model = c.llama(
    num_kv_heads=8,
    head_dim=128,
    rope_base=500000.0,
    dtype="bfloat16",
    remat=True,
    scan_layers=True,
    **_SIZES[size],
  )
  return c.Config(
    preset="none",
    fpp=c.FPPConfig(saving=0.3, attention="all"),
    data=c.DataConfig(vocab_size=128256, length=8192, batch_size=64),
    model=model,
    train=c.TrainConfig(steps=100_000),
    mesh=c.MeshConfig(data=1, fsdp=-1),
  )
