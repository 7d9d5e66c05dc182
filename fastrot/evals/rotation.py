"""What a rotation network says of pictures: probabilities of the four turns."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastrot.core import Batch, Method
from fastrot.methods.rotnet import TURNS, RotNet


@torch.no_grad()
def turn_guesses(method: Method, batch: Batch) -> Float[Tensor, "b 4 4"] | None:
    """Probabilities [picture, turn it was given, turn the net says], on the CPU in float32.

    None for a method that does not guess turns. The net is left in the mode that it was in.
    """
    if not isinstance(method, RotNet):
        return None
    training = method.net.training
    method.net.eval()
    logits = method.net(method.views(batch).float())
    method.net.train(training)
    return logits.float().softmax(dim=1).unflatten(0, (-1, len(TURNS))).cpu()
