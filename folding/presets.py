"""What a preset decides, for fields of the configuration that are None."""

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
  "none": {
    "fold": {"groups": 0, "v_block": 0},
    "fpp": {"linear": 0.0, "embedding": 0.0},
  },
  "moderate": {
    "fold": {"groups": 0, "v_block": 1},
    "fpp": {"linear": 0.0, "embedding": 0.0, "overall": 0.3},
  },
  "paper": {
    "fold": {"groups": 1, "v_block": 1},
    "fpp": {"linear": 0.7, "embedding": 0.7, "overall": 0.7},
  },
}
