"""Models on a hub, which is a server on this machine."""

import numpy as np
import pytest

import folding
from tests.models import checkpoints
from tests.serving import local_hub

pytestmark = pytest.mark.slow  # the library reads its address when it starts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hub") / "net"
  checkpoints.write(folder, "bert", "classify")
  (folder / "README.md").write_text("---\nlicense: mit\n---\n# Net\n")
  return folder


def test_load_of_a_revision_reads_it_and_its_licence(source, tmp_path):
  files = {file.name: file.read_bytes() for file in source.iterdir()}
  with local_hub.served(files) as server:
    done = local_hub.run(
      server,
      tmp_path,
      "import folding, numpy\n"
      f"model = folding.load('lab/net@{local_hub.REVISION}')\n"
      "print(model.origin.base, model.origin.license)\n"
      "numpy.save('found', model.params['head']['kernel'])\n",
    )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout == "lab/net mit\n"
  expected = folding.load(source).params["head"]["kernel"]
  np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)


def test_push_to_hub_sends_the_folder(source, tmp_path):
  program = (
    "import folding, sys\n"
    f"model = folding.load({str(source)!r})\n"
    "model.save('out', push_to_hub='lab/net')\n"
  )
  with local_hub.served({}) as server:
    refused = local_hub.run(server, tmp_path, program)
    assert "set HF_TOKEN" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert server.pushed == {}
    done = local_hub.run(server, tmp_path, program, HF_TOKEN="hf_word")
    assert done.returncode == 0, done.stderr[-2000:]
    sent = server.pushed
  written = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
  assert sent == written
  assert b"# lab/net" in sent["README.md"]
