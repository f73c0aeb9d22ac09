"""The error whose message is written for the user: commands and scripts show it as a sentence, without a traceback."""


class UserError(ValueError):
    """What was asked for cannot be done; the message says why, and what to do instead."""
