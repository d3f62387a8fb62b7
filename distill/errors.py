"""The one kind of error that the trainer shows without a traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can put right.

    The message stands by itself: what was wrong, what was found, what was expected, what to do.
    """
