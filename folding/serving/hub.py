"""Uploads of exported folders to the Hugging Face hub."""

import re

from folding.errors import ConfigError, first_line


def require_pushable(name: str, *, is_folder: bool) -> None:
  """Raises `ConfigError` unless there is a folder to push, and a token."""
  if not is_folder:
    raise ConfigError("push_to_hub uploads a folder, and this format is a file")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise ConfigError(f"push_to_hub is USER/NAME on the hub; it is {name!r}")
  import huggingface_hub  # slow to import

  if huggingface_hub.get_token() is None:
    raise ConfigError(
      f"{name} cannot be pushed: there is no token of the Hugging Face hub; run "
      "`hf auth login`, or set HF_TOKEN"
    )


def push(folder: str, name: str) -> None:
  """Uploads a folder to a repository, which is created if it does not exist.

  Raises:
    ConfigError: the hub refuses it, or cannot be reached.
  """
  import huggingface_hub

  hub = huggingface_hub.HfApi()
  try:
    hub.create_repo(name, exist_ok=True)
    hub.upload_folder(repo_id=name, folder_path=folder)
  # Offline, no permission, a bad name: each raises another exception.
  except Exception as error:
    raise ConfigError(
      f"{folder} is written, and the Hugging Face hub did not take it as {name} "
      f"({first_line(error)})"
    ) from error
