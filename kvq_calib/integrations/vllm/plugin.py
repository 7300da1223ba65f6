"""Entry point of the group ``vllm.general_plugins``: registers the backend in every process of vLLM.

Nothing changes without ``--attention-backend CUSTOM``. Two methods of the platform are wrapped. In
``check_and_update_config``, a configuration that cannot be served is refused before loading, and the page size is set.
The CPU platform's ``get_attn_backend_cls`` would ignore CUSTOM.
"""

from __future__ import annotations

import logging
from functools import wraps
from typing import Any

from kvq_calib.codec.packing import PAGE_TOKENS
from kvq_calib.integrations.vllm.checks import check_configuration

__all__ = ["BACKEND", "register"]

#: Import path of the backend.
BACKEND = "kvq_calib.integrations.vllm.backend.PackedBackend"
_MARK = "_kvq_calib_wrapped"

_log = logging.getLogger("vllm.kvq_calib")


def register() -> None:
    """Register the backend. A second call changes nothing. A failure never prevents vLLM from starting."""
    try:
        _register()
    except Exception as error:
        _log.warning("the packed cache of kvq-calib is not available in this version of vLLM: %r", error)


def _register() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    platform = type(current_platform)
    if getattr(platform, _MARK, False):
        return
    _check_at_start(platform)
    if current_platform.is_cpu():
        _let_custom_through(platform)
    setattr(platform, _MARK, True)


def _asked_for(config: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return config.attention_config.backend is custom and custom.get_path() == BACKEND


def _check_at_start(platform: Any) -> None:
    import vllm

    original = platform.check_and_update_config.__func__

    @wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if _asked_for(vllm_config) and vllm_config.model_config is not None:
            check_configuration(vllm_config, vllm.__version__, cls.device_type)
        original(cls, vllm_config)
        if _asked_for(vllm_config):
            vllm_config.cache_config.block_size = PAGE_TOKENS

    platform.check_and_update_config = classmethod(check_and_update_config)


def _let_custom_through(platform: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original = platform.get_attn_backend_cls.__func__

    @wraps(original)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            path: str = selected_backend.get_path()
            return path
        found: str = original(cls, selected_backend, *args, **kwargs)
        return found

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
