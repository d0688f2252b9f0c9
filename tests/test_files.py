import errno
import os
import pathlib

import pytest

from configs import quickstart
from folding import files
from folding.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]


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


def test_write_file_on_a_full_disk_names_the_file(tmp_path, monkeypatch):
  def fail(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("os.fsync", fail)
  with pytest.raises(OSError, match=r"No space left on device: '.*/page'"):
    files.write_file(str(tmp_path / "page"), "text")


def test_write_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr("os.fsync", lambda h: (calls.append("sync"), fsync(h)))
  monkeypatch.setattr(
    "os.replace", lambda a, b: (calls.append("rename"), replace(a, b))
  )
  files.write_file(str(tmp_path / "page"), "text")
  assert calls == ["sync", "rename", "sync"]  # the folder last


def test_becoming_removes_what_killed_processes_left(tmp_path):
  names = ["new.0123abcd.part", "new.1123abcd.part", "new.2123abcd.part"]
  dead, held, fresh = (tmp_path / name for name in names)
  for folder in (dead, held, fresh):
    folder.mkdir()
    (folder / "a").touch()
  for folder in (dead, held):
    os.utime(folder, (0, 0))
  handle = files.lock(str(held))
  if handle is None:
    pytest.skip("this file system has no locks")
  with files.becoming(str(tmp_path / "new")):
    assert not dead.exists()
    assert held.exists()
    assert fresh.exists()
  os.close(handle)


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


@pytest.mark.parametrize("name", [".", "", "../link", "..", "x\udcff", "/"])
def test_output_that_cannot_become_a_folder_is_refused(
  tmp_path, monkeypatch, name
):
  (tmp_path / "empty").mkdir()
  (tmp_path / "link").symlink_to("nowhere")
  monkeypatch.chdir(tmp_path / "empty")
  with pytest.raises(ConfigError):
    files.require_empty(name)


def test_empty_folder_is_replaced_whatever_its_spelling(tmp_path):
  (tmp_path / "new").mkdir()
  files.require_empty(f"{tmp_path}/new/.")
  with files.becoming(f"{tmp_path}/new/.") as part:
    pathlib.Path(part, "a").write_text("a")
  assert (tmp_path / "new" / "a").is_file()


def test_file_that_cannot_be_written_is_refused(tmp_path):
  name = f"{tmp_path}/{'a' * 245}.npy"  # too long with the ending of a part
  with pytest.raises(ConfigError, match="cannot write .*: File name too long"):
    files.require_new_file(name, ".npy")
  files.require_new_file(f"{tmp_path}/a.npy", ".npy")
  assert list(tmp_path.iterdir()) == []


def test_wildcards_are_for_exports_and_not_for_runs(tmp_path):
  files.require_empty(f"{tmp_path}/a[1]*?")
  with pytest.raises(ConfigError, match=r"checkpoints .* because of the \["):
    files.require_workdir(f"{tmp_path}/a[1]")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_damaged_json_is_refused(tmp_path, text):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(ConfigError, match="damaged"):
    files.read_json(str(tmp_path / "a.json"), dict)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("import sys\nsys.exit(7)\n", "a.py:2 fails: SystemExit: 7"),
    ("def get_config():\n  return {}[1]\n", "a.py:2 fails: KeyError: 1"),
    ("def get_config(:\n", "a.py fails: SyntaxError: .*line 1"),
    ("def get_study(): ...\n", r"a.py' has no get_config\(\)"),
  ],
)
def test_file_of_the_user_that_fails_is_an_error(tmp_path, text, message):
  (tmp_path / "a.py").write_text(text)
  with pytest.raises(ConfigError, match=message):
    files.call_in_file(str(tmp_path / "a.py"), "get_config")


def test_config_file_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  found = files.call_in_file("configs/quickstart.py", "get_config")
  assert found == quickstart.get_config()
  assert str(ROOT / "configs" / "quickstart.py") in capsys.readouterr().err
  with pytest.raises(ConfigError, match="no file"):
    files.call_in_file("configs/no_such.py", "get_config")
  # A file of the user wins.
  (tmp_path / "configs").mkdir()
  own = tmp_path / "configs" / "quickstart.py"
  own.write_text("def get_config():\n  return 7\n")
  assert files.call_in_file("configs/quickstart.py", "get_config") == 7
  assert not capsys.readouterr().err
