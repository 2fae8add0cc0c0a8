"""Silence the progress bars and advice of transformers and diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers and diffusers log errors only; the caller reports problems itself.

    Downloads keep their bars: they take minutes.
    """
    import diffusers.utils
    import transformers.utils
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    loggings = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.is_progress_bar_enabled(), logging.get_verbosity()) for logging in loggings]
    downloads_shown = not are_progress_bars_disabled()
    for logging in loggings:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    if downloads_shown:
        enable_progress_bars()  # transformers switches the hub's off with its own
    try:
        yield
    finally:
        for logging, (shown, verbosity) in zip(loggings, before, strict=True):
            logging.set_verbosity(verbosity)
            if shown:
                logging.enable_progress_bar()
