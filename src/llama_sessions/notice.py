"""What a user should read once: a warning in the log, and from then on only for those who read everything."""

from __future__ import annotations

import logging


class Notice:
    """One thing to say, maybe often."""

    def __init__(self) -> None:
        self._level = logging.WARNING

    def say(self, logger: logging.Logger, text: str, *args: object) -> None:
        level, self._level = self._level, logging.DEBUG
        logger.log(level, text, *args)
