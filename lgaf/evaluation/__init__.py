"""Published evaluation protocols."""

from lgaf.evaluation.verification import VerificationResult, verification_accuracy

__all__ = ["VerificationResult", "verification_accuracy"]
