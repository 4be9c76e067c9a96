"""DvD from Python: ``from dvd import DvD``. Nothing but the names; what is behind them is ``deploy.offline``."""

from common.service.errors import (
    AuthenticationFailed,
    ConfigError,
    DvdError,
    InvalidRequest,
    Overloaded,
    StartupError,
    Unavailable,
)
from deploy.client import Thought
from deploy.offline.batch import BatchError, BatchStream
from deploy.offline.conversation import Conversation
from deploy.offline.dvd import DvD
from deploy.offline.prompt import Prompt, Sampling
from deploy.offline.reply import Reply, Stream, Timing, Usage

__all__ = [
    "AuthenticationFailed",
    "BatchError",
    "BatchStream",
    "ConfigError",
    "Conversation",
    "DvD",
    "DvdError",
    "InvalidRequest",
    "Overloaded",
    "Prompt",
    "Reply",
    "Sampling",
    "StartupError",
    "Stream",
    "Thought",
    "Timing",
    "Unavailable",
    "Usage",
]
