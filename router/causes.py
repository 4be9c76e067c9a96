"""What a group of tasks failed of."""

from collections.abc import Sequence

from common.service.errors import DvdError, InvalidRequest


def cause_of(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error to tell. A bug must not hide behind an expected error; bad input explains what it caused."""
    leaves = list(_leaves(errors))
    bugs = [error for error in leaves if not isinstance(error, DvdError)]
    bad_input = [error for error in leaves if isinstance(error, InvalidRequest)]
    return (bugs or bad_input or leaves)[0]


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Sequence[BaseException]:
    leaves: list[BaseException] = []
    for error in errors.exceptions:
        leaves.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return leaves
