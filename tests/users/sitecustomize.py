"""Hides scipy from the processes that tests start: users have none, and transformers imports it where it finds it.

That takes a second per process.
"""

from __future__ import annotations

import sys

sys.modules["scipy"] = None  # type: ignore[assignment]
