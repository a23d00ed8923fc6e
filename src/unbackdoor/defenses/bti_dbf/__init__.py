"""BTI-DBF (U): invert the trigger by leaving the benign features alone, and unlearn it."""

from unbackdoor.defenses.bti_dbf.method import BTIDBFConfig, purify

__all__ = ["BTIDBFConfig", "purify"]
