"""Random numbers of replicates, which each has for itself."""

from ppvae._scopes import random_numbers, random_state, set_random_numbers


class Stream:
    """The random numbers of one replicate: inside the context they are those of `fit`.

    Args:
        seed: from which they begin.

    Attributes:
        states: where its generators stand.
    """

    def __init__(self, seed: int) -> None:
        with random_state(seed):
            self.states = random_numbers()

    def __enter__(self) -> None:
        self.outside = random_numbers()
        set_random_numbers(self.states)

    def __exit__(self, *_: object) -> None:
        self.states = random_numbers()
        set_random_numbers(self.outside)
