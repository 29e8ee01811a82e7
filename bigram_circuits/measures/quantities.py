"""`Quantity`, and the quantities that several parts of the package measure.

Quantities that only one analysis measures are defined next to it.
"""

from __future__ import annotations

from dataclasses import dataclass

_ABBREVIATIONS = {"kl": "KL", "cka": "CKA"}


@dataclass(frozen=True)
class Quantity:
    """A measured quantity: its name, unit and meaning.

    Example:
        >>> lens = bc.logit_lens(model, text="import os")
        >>> print(lens.quantity("entropy").unit)
        nats
    """

    name: str
    """Its key, for example `kl`."""
    unit: str
    """`nats`, `degrees`, `share`, or empty for a pure number."""
    meaning: str
    """A description in one sentence."""

    @property
    def label(self) -> str:
        """Its name in words, with the unit."""
        return f"{self.words} ({self.unit})" if self.unit else self.words

    @property
    def words(self) -> str:
        """Its name in words."""
        return " ".join(_ABBREVIATIONS.get(word, word) for word in self.name.split("_"))


SURPRISAL_CORRELATION = Quantity("surprisal_correlation", "", "Pearson r of the model's surprisals with the target's.")
CROSS_ENTROPY = Quantity("cross_entropy", "nats", "Mean cross-entropy from the target's distribution to the model's.")
KL = Quantity("kl", "nats", "Mean KL divergence from the target's distribution to the model's.")
MEAN_SURPRISAL = Quantity("mean_surprisal", "nats", "The model's own next-token loss.")
TOP1_AGREEMENT = Quantity("top1_agreement", "share", "Positions where the model's most likely token is the target's.")
FRACTION = Quantity("fraction", "share", "Of the maskable weights, those that are kept.")
CONTEXT_TOLD = Quantity(
    "context_told", "share", "1 - KL / KL of the best constant: 1 at the target, 0 if the context is unused."
)
COUNT = Quantity("count", "tokens", "How often the token occurs in the text.")

FAITHFULNESS = (SURPRISAL_CORRELATION, CROSS_ENTROPY, KL, MEAN_SURPRISAL, TOP1_AGREEMENT)
"""The quantities in `Faithfulness`; its other fields are counts and their ratio."""
MEASURED = tuple(one.name for one in FAITHFULNESS)
"""Names of these quantities."""
