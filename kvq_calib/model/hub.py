"""Helpers for the Hugging Face libraries: quiet loading, and no waiting for a missing network."""

from __future__ import annotations

import contextlib
import socket
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub.constants
import huggingface_hub.utils
import transformers.utils.logging

_transformers: Any = transformers.utils.logging
_hub: Any = huggingface_hub.utils

__all__ = ["hub_reachable", "quiet"]


def hub_reachable() -> bool:
    """Return whether the hub can probably be reached. Without network, its client retries for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():  # perhaps only the proxy resolves names
        return True
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of the libraries, and keep standard output clean.

    Progress bars of downloads are shown on a terminal, but not in a log.
    """
    verbosity = _transformers.get_verbosity()
    bars = _transformers.is_progress_bar_enabled()
    hub_bars_off = _hub.are_progress_bars_disabled()
    hub_verbosity = _hub.logging.get_verbosity()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        _transformers.set_verbosity_error()
        _transformers.disable_progress_bar()
        _hub.logging.set_verbosity_error()
        if not hub_bars_off and sys.stderr.isatty():
            _hub.enable_progress_bars()
        try:
            yield
        finally:
            _transformers.set_verbosity(verbosity)
            _hub.logging.set_verbosity(hub_verbosity)
            if bars:
                _transformers.enable_progress_bar()
            (_hub.disable_progress_bars if hub_bars_off else _hub.enable_progress_bars)()
