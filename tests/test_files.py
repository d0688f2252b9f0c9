import os
import pathlib

import pytest

from folding import files


def test_write_file_keeps_the_old_file_on_failure(tmp_path, monkeypatch):
  path = tmp_path / "page"
  files.write_file(str(path), "old")

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    files.write_file(str(path), "new")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_write_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr("os.fsync", lambda h: (calls.append("sync"), fsync(h)))
  monkeypatch.setattr(
    "os.replace", lambda a, b: (calls.append("rename"), replace(a, b))
  )
  files.write_file(str(tmp_path / "page"), "text")
  assert calls == ["sync", "rename", "sync"]  # the folder last


def test_becoming_leaves_a_whole_folder_or_none(tmp_path):
  with pytest.raises(OSError, match="full"):
    with files.becoming(str(tmp_path / "new")) as part:
      pathlib.Path(part, "a").write_text("a")
      raise OSError("the disk is full")
  assert list(tmp_path.iterdir()) == []
  with files.becoming(str(tmp_path / "new")) as part:
    pathlib.Path(part, "a").write_text("a")
  assert [p.relative_to(tmp_path) for p in tmp_path.rglob("a")] == [
    pathlib.Path("new/a")
  ]
