"""Names on the Hugging Face hub, and the commits that they stand for."""

from __future__ import annotations

import pathlib
import re

# What can be a repository, if there is no such file: 'OWNER/NAME', of old data sets 'NAME'.
NAMES = {'model': r'[\w-][\w.-]*/[\w.-]+', 'dataset': r'[\w-][\w.-]*(/[\w.-]+)?'}


def is_commit(revision: str) -> bool:
  """Tells a commit, which stays what it is, from a branch or a tag, which can be moved."""
  return bool(re.fullmatch(r'[0-9a-f]{40}', revision))


def find_commit(repository: str, revision: str, kind: str) -> str:
  """Finds the commit that a name in a repository of the hub stands for now; if the hub cannot be
  reached, when it was last asked.

  Args:
    repository: its name.
    revision: a branch or a tag; '' for the main branch.
    kind: 'model' or 'dataset'.

  Raises:
    ValueError: the hub does not say.
  """
  import huggingface_hub  # takes a while to import: only where it is used
  try:
    folder = huggingface_hub.snapshot_download(
        repository, repo_type=kind, revision=revision or None, allow_patterns=['config.json'])
  except (OSError, ValueError) as e:  # what the hub raises are kinds of these
    raise ValueError(f'the hub does not say which commit that is ({" ".join(str(e).split())[:300]})'
                     ) from e
  return pathlib.Path(folder).name
