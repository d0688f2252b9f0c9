"""Writes the address of the library into colab/*.ipynb: `python docs/notebooks.py`.

It is `project.urls.Repository` of pyproject.toml. Without that entry a notebook
has no badge, and its user gives the address of a wheel or of a repository.
"""

import json
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
_COLAB = "https://colab.research.google.com"
_INSTALL = """\
SOURCE = "{source}"  # address of the library: git+https://..., or of its wheel
EXTRAS = "{extras}"  # add cuda for a GPU runtime, or tpu for a TPU runtime
try:
  import folding
except ImportError:
  assert SOURCE, "put the address of the library into SOURCE"
  %pip install -q "folding-jax[{{EXTRAS}}] @ {{SOURCE}}"
  import folding{unused}"""


def notebook(path: pathlib.Path) -> str:
  """Returns the text of a notebook with the address in its first two cells."""
  with open(ROOT / "pyproject.toml", "rb") as file:
    address = tomllib.load(file)["project"]["urls"].get("Repository", "")
  found = json.loads(path.read_text(encoding="utf-8"))
  head, install = found["cells"][:2]
  title, *rest = "".join(head["source"]).split("\n\n")
  parts = [part for part in rest if not part.startswith("[![")]
  if address.startswith("https://github.com/"):
    place = f"{address.removeprefix('https://github.com/')}/blob/main/colab"
    image = f"[![Open In Colab]({_COLAB}/assets/colab-badge.svg)]"
    parts.insert(0, f"{image}({_COLAB}/github/{place}/{path.name})")
  head["source"] = _lines("\n\n".join([title, *parts]))
  old = "".join(install["source"])
  new = _INSTALL.format(
    source=f"git+{address}" if address else "",
    extras=re.findall(r'EXTRAS = "(.*?)"', old)[0],
    unused="  # noqa: F401" if "noqa" in old else "",
  )
  install["source"] = _lines(new)
  return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


if __name__ == "__main__":
  for each in NOTEBOOKS:
    each.write_text(notebook(each), encoding="utf-8")
