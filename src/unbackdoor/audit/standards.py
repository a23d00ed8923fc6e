"""The checks and threats of public guides that an audit answers to, by their identifiers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Standard:
    """An entry of a guide: its identifier, what it is about, and what of the report answers it."""

    guide: str
    identifier: str
    about: str
    answered_by: str


# OWASP AI Security Verification Standard, draft: the numbers of chapter 6 may still change.
STANDARDS = (
    Standard(
        "OWASP AISVS (draft)",
        "C6.1.2",
        "models are scanned for malicious layers or trojan triggers before import",
        "inspection of the file, checks of the scan",
    ),
    Standard(
        "OWASP AISVS (draft)",
        "C6.1.3",
        "fine-tuned models are evaluated for hidden behaviour",
        "recovered triggers, comparison of both models",
    ),
    Standard("MITRE ATLAS", "AML.T0018", "backdoor in a model", "verdict, recovered triggers"),
    Standard("MITRE ATLAS", "AML.T0020", "poisoned training data", "verdict, as far as it left a backdoor"),
    Standard(
        "NIST AI 100-2 E2025",
        "NISTAML.021, NISTAML.023, NISTAML.026",
        "clean-label and backdoor poisoning of data, poisoning of a model",
        "verdict, as far as it left a backdoor",
    ),
    Standard(
        "NIST AI 100-2 E2025",
        "NISTAML.051",
        "poisoned model in the supply chain",
        "hash of the file, inspection, verdict",
    ),
)


def identifiers() -> list[dict[str, str]]:
    """Return guide and identifier of each as JSON."""
    return [{"guide": one.guide, "id": one.identifier} for one in STANDARDS]
