import json
import math
import struct

import pytest
from tensorboardX.proto import event_pb2

from folding import config as c
from folding.training.metrics import MetricsWriter, read_metrics

RECORDS = [
  {"split": "train", "step": 1, "loss": 2.5, "tokens_per_second": 10.0},
  {"split": "train", "step": 2, "loss": 2.0, "tokens_per_second": 11.0},
  {"split": "valid", "step": 2, "loss": 2.25, "perplexity": 9.5},
  {"split": "train", "step": 3, "loss": 1.5, "tokens_per_second": 12.0},
]


def config(tensorboard=False):
  return c.Config(train=c.TrainConfig(steps=10, tensorboard=tensorboard))


def write(workdir, records, first_step=0, tensorboard=False):
  with MetricsWriter(str(workdir), config(tensorboard), first_step) as writer:
    for record in records:
      writer.write(record)


def read(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_records_are_lines_at_once(tmp_path):
  with MetricsWriter(str(tmp_path), config(), 0) as writer:
    for count, record in enumerate(RECORDS, 1):
      writer.write(record)
      assert read(tmp_path) == RECORDS[:count]
  assert read_metrics(str(tmp_path / "metrics.jsonl")) == RECORDS


def test_no_file_is_no_records(tmp_path):
  assert read_metrics(str(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize(
  ("first_step", "kept"), [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)]
)
def test_resume_drops_what_came_after(tmp_path, first_step, kept):
  write(tmp_path, RECORDS)
  new = {"split": "valid", "step": 9, "loss": 1.0}
  write(tmp_path, [new], first_step)
  assert read(tmp_path) == [*RECORDS[:kept], new]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("num_bytes", [1, 30], ids=["brace", "half"])
def test_a_torn_line_is_passed_over(tmp_path, num_bytes):
  write(tmp_path, RECORDS)
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:3]) + lines[3][:num_bytes])
  assert read_metrics(str(path)) == RECORDS[:3]
  write(tmp_path, RECORDS[3:], first_step=2)
  assert read(tmp_path) == RECORDS


def test_a_line_without_its_end_is_whole(tmp_path):
  write(tmp_path, RECORDS)
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text().rstrip("\n"))
  write(tmp_path, RECORDS[3:], first_step=3)
  assert read(tmp_path) == [*RECORDS, RECORDS[3]]


def test_what_is_not_a_number_can_be_read_again(tmp_path):
  write(tmp_path, [RECORDS[0] | {"loss": math.nan}])
  [record] = read_metrics(str(tmp_path / "metrics.jsonl"))
  assert math.isnan(record["loss"])


def events(path):
  """Yields the events of a file: TFRecord framing, read by hand."""
  data = path.read_bytes()
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    yield event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


def scalars(path):
  return {
    (value.tag, event.step): value.simple_value
    for event in events(path)
    for value in event.summary.value
  }


def test_tensorboard_has_the_same_numbers(tmp_path):
  write(tmp_path, RECORDS, tensorboard=True)
  [file] = (tmp_path / "tensorboard").iterdir()
  assert scalars(file) == {
    (f"{r['split']}/{name}", r["step"]): value
    for r in RECORDS
    for name, value in r.items()
    if name not in ("split", "step")
  }


def test_tensorboard_hides_what_resume_drops_and_no_more(tmp_path):
  write(tmp_path, RECORDS, first_step=2, tensorboard=True)
  [file] = (tmp_path / "tensorboard").iterdir()
  starts = [e.step for e in events(file) if e.HasField("session_log")]
  # TensorBoard hides events of this step and later from earlier files; those
  # of step 2 stay in metrics.jsonl, and so here.
  assert starts == [3]


def test_say_prints_the_message_as_it_is(tmp_path, capsys):
  with MetricsWriter(str(tmp_path), config(), 0) as writer:
    writer.say("step 5  [bold] loss 1.5" + " " * 100 + "end")
  assert capsys.readouterr().out == (
    "step 5  [bold] loss 1.5" + " " * 100 + "end\n"
  )
