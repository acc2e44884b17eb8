"""What a check found."""

from __future__ import annotations

import dataclasses

OK, WARN, FAIL, OFF, SKIPPED = 'ok', 'warn', 'FAIL', 'off', 'skipped'


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check found.

  Attributes:
    check: its name, which is that of its switch in `config.doctor`.
    status: OK, WARN (worth a look), FAIL (no run starts), OFF (by its switch), SKIPPED (nothing to
      compare).
    detail: what was seen.
    field: the config field to change.
  """

  check: str
  status: str
  detail: str
  field: str = ''
