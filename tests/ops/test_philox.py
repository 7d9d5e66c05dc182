"""Philox4x32-10: Random123's known answers, and the words that Triton's own generator gives."""

import pytest
import torch

from fastrot.ops.choice import tl, triton
from fastrot.ops.philox import WORD, philox, scaled

ANSWERS = {  # Random123's kat_vectors for philox4x32, 10 rounds: key, counter, words
    "zeros": ([0, 0], [0, 0, 0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ([WORD] * 2, [WORD] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        [0xA4093822, 0x299F31D0],
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
SEEDS = [0, 12345, 2**40 + 99, -3, -(2**63), 2**63 - 1]
INDEX = [0, 7, 2**32 - 1, 2**32 + 5, 2**63 - 1, -1]


@pytest.mark.parametrize("name", ANSWERS)
def test_words_are_random123s(name):
    (low, high), counter, words = ANSWERS[name]
    got = philox(low | high << 32, *(torch.tensor(c) for c in counter))
    assert [f"{int(word):08x}" for word in got] == words.split()


def test_counters_broadcast_and_wrap_at_32_bits():
    rows, columns = torch.arange(5)[:, None], torch.arange(3)
    zero = torch.tensor(0)
    words = philox(9, columns, rows, zero, zero)
    assert all(word.shape == (5, 3) for word in words)
    again = philox(9 + 2**64, columns - 2**32, rows + 2**40, zero, zero + 2**33)
    assert all(torch.equal(a, b) for a, b in zip(words, again, strict=True))
    alone = philox(9, columns[2], rows[4, 0], zero, zero)
    assert [int(word[4, 2]) for word in words] == [int(word) for word in alone]


@pytest.mark.parametrize("size", [1, 2, 1_281_167, 2**31, 2**32 - 1])
def test_scaling_is_the_high_half_of_the_product(size):
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, WORD])
    assert scaled(words, size).tolist() == [int(word) * size >> 32 for word in words]


if triton is not None:

    @triton.jit(do_not_specialize=["seed", "size"])
    def words_kernel(seed, index, step, size, out, COUNT: tl.constexpr):
        place = tl.arange(0, COUNT)
        address = tl.load(index)
        low, high = address.to(tl.uint32), (address >> 32).to(tl.uint32)
        now = tl.load(step).to(tl.uint32)
        words = tl.philox(seed.to(tl.uint64), place.to(tl.uint32), low, high, now)
        for word in tl.static_range(4):
            tl.store(out + 8 * place + word, words[word].to(tl.int64))
            pick = tl.umulhi(words[word], size.to(tl.uint32))
            tl.store(out + 8 * place + 4 + word, pick.to(tl.int64))


def tritons_words_are_ours(device: str):
    for seed in SEEDS:
        for index in INDEX:
            for step, size in ((0, 10), (2**32 + 3, 2**32 - 1)):
                out = torch.zeros(16, 8, dtype=torch.int64, device=device)
                where = [torch.tensor(v, device=device) for v in (index, step)]
                words_kernel[(1,)](seed, *where, size, out, COUNT=16)
                address = torch.tensor(index)
                place, now = torch.arange(16), torch.tensor(step)
                want = torch.stack(philox(seed, place, address, address >> 32, now), dim=1)
                assert torch.equal(out[:, :4].cpu(), want), (seed, index, step)
                assert torch.equal(out[:, 4:].cpu(), scaled(want, size)), (seed, index, size)


@pytest.mark.skipif(
    triton is None or torch.cuda.is_available(), reason="for machines with Triton and no GPU"
)
def test_tritons_generator_gives_the_same_words():
    tritons_words_are_ours("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tritons_generator_gives_the_same_words_on_a_gpu():
    tritons_words_are_ours("cuda")
