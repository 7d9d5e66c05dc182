"""Philox4x32-10 (Salmon 2011): random words that have an address, the same on every device.

Shapes.  Counters c0 to c3 broadcast together; four tensors of words of that shape come out, int64 that hold 32 bits.
Maths.   Ten rounds of c0, c1, c2, c3 <- high(B c2) ^ c1 ^ k0, low(B c2), high(A c0) ^ c3 ^ k1, low(A c0), after each of
         which k0 and k1 grow by W0 and W1, all modulo 2**32. The key is the seed's low and high half.
Idea.    Integers only, so no device has room to differ. `tl.philox` is the same function inside a kernel; a product
         of two words wraps int64's sign, but its 64 bits are the right ones.
"""

from torch import Tensor

WORD = 2**32 - 1
A, B = 0xD2511F53, 0xCD9E8D57  # the rounds' multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # the keys' steps: golden ratio and sqrt(3) - 1


def philox(
    seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words at each counter; counters are int64, taken modulo 2**32, the seed modulo 2**64."""
    k0, k1 = seed & WORD, seed >> 32 & WORD
    c0, c1, c2, c3 = c0 & WORD, c1 & WORD, c2 & WORD, c3 & WORD
    for _ in range(10):
        first, second = c0 * A, c2 * B
        c0 = ((second >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(WORD)
        c2 = ((first >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c1, c3 = second.bitwise_and_(WORD), first.bitwise_and_(WORD)
        k0, k1 = k0 + W0 & WORD, k1 + W1 & WORD
    return c0, c1, c2, c3


def scaled(word: Tensor, size: int | Tensor) -> Tensor:
    """A word as a number from 0 to size - 1: the high half of their product (`tl.umulhi`); size is below 2**32."""
    return (word * size) >> 32 & WORD
