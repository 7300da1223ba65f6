"""Chats: lists of messages, rendered as text by the tokenizer's chat template, as the model saw them in training."""

from __future__ import annotations

from typing import Any, TypeAlias

from kvq_calib.data.tokens import bos_token_id
from kvq_calib.errors import DataError, one_line

__all__ = ["Messages", "check_messages", "render_chat"]

Messages: TypeAlias = list[dict[str, Any]]
"""Messages in order, each with a `role` and a `content`. The template may use further keys."""


def check_messages(value: list[Any], where: str) -> Messages:
    """Check that `messages` can be a chat, and return it.

    Raises:
        DataError: the list is empty, a `role` is missing or is not text, or a `content` is a number or an object.
    """
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} is not an object with a role and a content")
        if not isinstance(message.get("content"), str | list | None):
            raise DataError(f"{where}: the content of message {number} is not text")
    if not value:
        raise DataError(f"{where}: a chat without a message")
    return value


def render_chat(messages: Messages, tokenizer: Any, where: str) -> str:
    """Return a chat as text, with its control tokens written out.

    The beginning-of-sequence token is left out where the tokenizer adds one to every text, because every window gets
    one.

    Raises:
        DataError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a chat, and the model's tokenizer has no chat template; use the model's instruction-tuned "
            "version, or name a field of plain text with --text-field"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        text.encode()
    except Exception as error:  # a template is a program of its own
        raise DataError(f"{where}: the tokenizer's chat template fails ({one_line(error)})") from error
    if bos_token_id(tokenizer) is not None:
        text = text.removeprefix(tokenizer.bos_token)
    return str(text)
