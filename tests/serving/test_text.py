import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from folding import cli
from folding import config as c
from folding.data.tokenizers import train_tokenizer
from folding.errors import ConfigError
from folding.model import Model
from folding.models import hf_weights
from folding.models.shape import shape_of
from folding.models.transformer import make_model
from folding.serving import export as export_lib
from folding.serving.generate import Generator, continue_texts, decode_parts
from folding.serving.sampling import Sampling
from tests.models import checkpoints
from tests.serving import models

NEW = 12
TEXTS = ["def café", "", "x = "]


@pytest.fixture(scope="module")
def loaded():
  """Returns a model of bytes, as wild as random parameters are."""
  config = c.resolve(
    c.Config(
      data=c.DataConfig(tokenizer="bytes", length=32),
      model=c.gpt2(num_layers=1, width=16, num_heads=2),
      fold=c.FoldConfig(groups=2),
    )
  )
  tokenizer = train_tokenizer(config.data, [])
  model = make_model(shape_of(config), tokenizer.vocab_size)
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes
  )
  return Model.of(config, params, tokenizer)


@pytest.fixture(scope="module")
def expected(loaded):
  """Returns what follows each text, by itself as the first of a batch."""
  tokenizer = loaded.tokenizer
  prompts = [ids for ids in tokenizer.encode_batch(TEXTS)]
  prompts[1] = np.array([tokenizer.end_id])
  generator = Generator(loaded.module)
  found = [
    generator(
      loaded.params, [ids], max_new_tokens=NEW, end_id=tokenizer.end_id
    )[0]
    for ids in prompts
  ]
  return [tokenizer.decode(ids) for ids in found]


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
  path = tmp_path_factory.mktemp("export") / "out"
  export_lib.export(path, loaded)
  return str(path)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_are_decoded_to_the_whole_text(size):
  tokenizer = train_tokenizer(c.DataConfig(tokenizer="bytes"), [])
  prompt, new = tokenizer.encode_batch(["naï", "veté: 日本 🎈!"])
  parts = [new[i : i + size] for i in range(0, len(new), size)]
  pieces = list(decode_parts(tokenizer, prompt, parts))
  assert "".join(pieces) == "veté: 日本 🎈!"
  assert not any("\ufffd" in piece for piece in pieces)
  assert len(pieces) > 1
  cut = list(decode_parts(tokenizer, prompt, [new[:-3]]))
  assert cut[-1].endswith("\ufffd")  # half a balloon: the end has come


def test_spaces_between_words_are_those_of_the_whole_text():
  tokenizer = models.make("lm").tokenizer
  prompt, new = tokenizer.encode_batch(["the cat", "sat on cat"])
  parts = np.split(new, len(new))
  pieces = list(decode_parts(tokenizer, prompt, parts))
  assert pieces == [" sat", " on", " cat"]


def test_single_text_is_streamed(loaded, expected):
  pieces = list(
    continue_texts(loaded, TEXTS[:1], max_new_tokens=NEW, sampling=Sampling())
  )
  assert pieces[0] == TEXTS[0]
  assert len(pieces) > 2
  assert "".join(pieces) == TEXTS[0] + expected[0] + "\n"


def test_model_generates_the_continuations_alone(loaded, expected):
  found = loaded.generate(TEXTS, max_new_tokens=NEW)
  assert found == expected


def test_one_text_is_not_a_list_of_prompts(loaded):
  with pytest.raises(ConfigError, match="one text"):
    continue_texts(loaded, "ab", max_new_tokens=NEW, sampling=Sampling())


def _page(expected):
  return "".join(
    f"== {n + 1} of 3 ==\n{TEXTS[n]}{expected[n]}\n" for n in range(3)
  )


def test_generate_prints_prompts_and_lines_of_a_file_in_order(
  folder, expected, tmp_path, capsys
):
  file = tmp_path / "prompts.txt"
  file.write_text("\n".join(TEXTS[1:]) + "\n")
  argv = ["generate", folder, "--temperature=0", f"--max-new-tokens={NEW}"]
  assert cli.main([*argv, f"--prompt={TEXTS[0]}", f"--file={file}"]) == 0
  assert capsys.readouterr() == (_page(expected), "")


def test_generate_begins_a_document_where_there_is_no_prompt(
  folder, expected, capsys
):
  argv = ["generate", folder, "--temperature=0", f"--max-new-tokens={NEW}"]
  assert cli.main(argv) == 0
  assert capsys.readouterr().out == expected[1] + "\n"


def test_generate_depends_on_the_seed(folder, capsys):
  texts = set()
  for seed in (0, 0, 1):
    argv = ["generate", folder, "--prompt=a", "--max-new-tokens=9"]
    assert cli.main([*argv, "--top-k=50", "--top-p=0.9", f"--seed={seed}"]) == 0
    texts.add(capsys.readouterr().out)
  assert len(texts) == 2


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--prompt=" + 33 * "x"], "33 tokens"),
    (["--temperature=-1"], "temperature"),
    (["--file=nowhere"], "No such file"),
    (["--file=-"], "no text in standard input"),
    (["--cache=linear"], "constant state"),
  ],
)
def test_generate_reports_a_mistake_in_one_line(
  folder, capsys, monkeypatch, argv, message
):
  monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
  assert cli.main(["generate", folder, *argv]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  (line,) = err.splitlines()
  assert line.startswith("folding: error: ")
  assert message in line


def test_generate_continues_as_llama2_c_does(shared_data, capsys):
  folder = shared_data / "stories260K" / "hf"
  argv = ["generate", str(folder), "--temperature=0", "--max-new-tokens=60"]
  assert cli.main(argv) == 0
  # As doc/stories260K.md of llama2.c prints it for these weights.
  assert capsys.readouterr().out.startswith(
    "Once upon a time, there was a little girl named Lily. She loved to play "
    "outside in the park. One day, she saw a big, red ball. She wanted to play "
    "with it, but it was too high"
  )


def test_the_beginning_of_a_document_ends_a_text():
  loaded = models.make("lm")
  begin = models.vocabulary(models.word_pieces())["cat"]
  loaded.tokenizer.begin_ids = np.array([begin], np.int32)
  # Whatever the text, this token has the largest logit.
  rows = loaded.params["embed"]["embedding"]
  rows[begin] *= 10
  loaded.params["norm_final"] = {"scale": 0 * rows[0], "bias": rows[begin]}
  parts = continue_texts(
    loaded, ["the dog"], max_new_tokens=3, sampling=Sampling()
  )
  assert "".join(parts) == "the dog cat\n"


@pytest.mark.filterwarnings("ignore")  # those of torch
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_text_ends_where_transformers_ends_it(tmp_path, place):
  reason = "needs the extra `parity` (PyTorch and transformers)"
  torch = pytest.importorskip("torch", reason=reason)
  transformers = pytest.importorskip("transformers", reason=reason)
  transformers.logging.set_verbosity_error()
  words = [*checkpoints.WORDS, *(f"w{i}" for i in range(10, checkpoints.V))]
  folder, out = tmp_path / "llama", tmp_path / "out"
  described = checkpoints.description("llama", "lm")
  params = checkpoints.random_params(described)
  params["head"]["kernel"][:, :4] = 0  # never a token that is not printed
  hf_weights.save_pretrained(
    folder, params, described, bos_token_id=1, eos_token_id=2
  )
  checkpoints.write_tokenizer(folder / "tokenizer.json", words)
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  tokenizer.add_tokens(words)  # so that each may be what ends
  tokenizer.save(str(folder / "tokenizer.json"))
  sampling = Sampling()

  def ours(path):
    loaded = export_lib.load(path)
    parts = continue_texts(loaded, ["a b"], max_new_tokens=8, sampling=sampling)
    return "".join(parts).split()

  def theirs(path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, ids = load(path).eval(), torch.tensor([[1, 4, 5]])
    ids = model.generate(ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(ids[0].tolist()).split()

  free = theirs(folder)
  assert ours(folder) == free
  assert len(free) == 10  # nothing has ended it
  ends = [tokenizer.token_to_id(free[6]), tokenizer.token_to_id(free[5])]
  values = json.loads((folder / "config.json").read_text("utf-8"))
  values |= {"eos_token_id": ends[0]}
  (folder / "config.json").write_text(json.dumps(values))
  if place == "generation_config.json":
    values = {"eos_token_id": ends, "do_sample": False}
    (folder / place).write_text(json.dumps(values))
  expected = theirs(folder)
  assert 4 <= len(expected) < 10
  assert ours(folder) == expected
  export_lib.export_hf(out, export_lib.load(folder))
  assert ours(out) == theirs(out) == expected
