"""Published claims as experiments: a file a claim, found by its being here.

``python -m benchmarks.claims NAME SEED FOLDER`` runs one seed of one of them, ``python -m benchmarks.claims verdicts RESULTS``
says what a results folder tells about all. See :mod:`benchmarks.claims.base` for what a file must hold.
"""

from benchmarks.claims.base import Claim, Measured, Verdict, claim_names, find_claim

__all__ = ["Claim", "Measured", "Verdict", "claim_names", "find_claim"]
