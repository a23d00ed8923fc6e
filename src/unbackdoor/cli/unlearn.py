"""``unbackdoor unlearn``: a command that was, and what does its work now."""

from __future__ import annotations

from unbackdoor.errors import InputError


def unlearn() -> None:
    """Name the commands that do what this one did."""
    raise InputError(
        "there is no command unlearn any more",
        remedy="The vote: scan --checks rnp_vote, with --references for a verdict. "
        "The trigger: scan --checks rnp_vote --set rnp_vote.recover_trigger=true --report DIR. "
        "The images: screen --method rnp. "
        "The repair by a ranking of channels: purify --method unlearned_prune",
    )
