"""What methods report when they are evaluated: sums and counts, added over batches and ranks before dividing."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

Scores = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), each 0-d


def wide(outputs: Tensor) -> Tensor:
    """float32 at least: half precision widened, float64 kept."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def told_apart(
    cosine: Float[Tensor, "b b"],
) -> tuple[Float[Tensor, "b b"], Float[Tensor, "b b"]]:
    """Of cosines [of view i, picture j]: how far each view is nearer to its own picture than to j, and 1 where j is another.

    A lone picture is another to itself.
    """
    apart, b = cosine.diagonal()[:, None] - cosine, len(cosine)
    own = torch.eye(b, dtype=apart.dtype, device=apart.device) if b > 1 else 0
    return apart, torch.ones_like(apart) - own


def classification_scores(logits: Float[Tensor, "v k"], label: Int64[Tensor, " v"]) -> Scores:
    """Cross-entropy and top-1 accuracy as (sum, count), in float32: counts of pictures stay exact to 2**24."""
    count = torch.full((), float(len(label)), device=logits.device)  # torch.tensor would wait
    return {
        "loss": (F.cross_entropy(wide(logits), label, reduction="sum"), count),
        "accuracy": ((logits.argmax(dim=1) == label).float().sum(), count),
    }
