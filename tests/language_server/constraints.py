"""A constraint without a library: which tokens may come at each step, and which came."""

from common.service.errors import DvdError


class Steps:
    """Allows ``steps[i]`` as the i-th token, and nothing behind the last; the last step again and again if endless."""

    def __init__(self, *steps, vocab_size=512, endless=False):
        self.steps = [set(step) for step in steps]
        self.vocab_size = vocab_size
        self.endless = endless
        self.consumed: list[int] = []
        self.error: DvdError | None = None  # of the next mask
        self.late_error: DvdError | None = None  # of the next token

    @property
    def is_finished(self):
        return not self.endless and len(self.consumed) == len(self.steps)

    @property
    def allowed(self):
        return self.steps[min(len(self.consumed), len(self.steps) - 1)]

    def mask(self):
        if self.error is not None:
            raise self.error
        bits = sum(1 << token_id for token_id in self.allowed)
        return bits.to_bytes(-(-self.vocab_size // 32) * 4, "little")

    def consume(self, token_id):
        if self.late_error is not None:
            raise self.late_error
        is_allowed = token_id in self.allowed
        self.consumed.append(token_id)
        return is_allowed
