"""Randomness is a function of (seed, purpose, n, k) and of nothing else."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from hpc_gen.runtime import randomness
from hpc_gen.runtime.errors import UserError
from hpc_gen.runtime.randomness import Draw, Draws, Integers, Normal, Stream, Uniform, permutation, stream_key


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def test_pinned_vectors() -> None:
    """Numbers of earlier runs. If this fails, resumed runs differ from undisturbed ones: do not update in passing."""
    assert stream_key(0, "train/noise") == 0x752D05BE3C986541FD99F9FD5B29C689
    normal = Stream(7, "train/noise").draw(Draw((3,)), n=10**12, k=2)
    assert normal.tolist() == [-0.6635364294052124, 0.44523343443870544, 0.7342230677604675]
    uniform = Stream(7, "train/t").batch(Draw((), Uniform(0.0, 1.0)), [0, 1, 2**63])
    assert uniform.tolist() == [0.8722493052482605, 0.17899161577224731, 0.6049901843070984]
    integers = Stream(-1, "train/t").batch(Draw((2,), Integers(-5, 1000)), [0, 1])
    assert integers.tolist() == [[840, 185], [962, 101]]
    assert permutation(7, "order/shards", 3, 10).tolist() == [3, 2, 1, 9, 4, 8, 5, 0, 6, 7]
    weights = torch.randn(2, generator=randomness.torch_generator(7, "init/net"))
    assert weights.tolist() == [-0.49580270051956177, -0.7203794121742249]


def test_another_numpy_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    randomness.check_pinned.__wrapped__()
    monkeypatch.setitem(randomness.PINNED, "normal", [0.0, 0.0, 0.0, 0.0])
    with pytest.raises(UserError, match=r"numpy .* draws other normal numbers"):
        randomness.check_pinned.__wrapped__()


def test_a_draw_does_not_depend_on_its_batch_or_on_what_was_drawn_before() -> None:
    for distribution in (Normal(), Uniform(-2.0, 5.0), Integers(0, 7)):
        stream, draw = Stream(3, "p"), Draw((2, 5), distribution)
        whole = stream.batch(draw, range(20), k=4)
        assert whole.shape == (20, 2, 5) and whole.dtype == draw.dtype
        for n in (19, 0, 7):  # another order, other neighbours
            assert _same_bits(stream.draw(draw, n, k=4), whole[n])
        stream.batch(Draw((3,), Integers(0, 2)), [1])  # leaves half a word behind in the generator
        assert _same_bits(stream.batch(draw, [5, 3], k=4), whole[[5, 3]])
        assert _same_bits(Stream(3, "p").batch(draw, torch.tensor([5, 3]), k=4), whole[[5, 3]])
        assert _same_bits(Stream(3, "p").batch(draw, np.array([5, 3]), k=4), whole[[5, 3]])
        assert stream.batch(draw, []).shape == (0, 2, 5)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    stream = Stream(3, "p")
    assert _same_bits(stream.draw(Draw((4,)), 1), stream.draw(Draw((400,)), 1)[:4])


def test_no_two_of_n_k_purpose_seed_share_a_word() -> None:
    """Neighbours in every argument: 48 streams of 4,000 words, no word twice (by chance: once in 10**9 runs)."""
    words: list[np.ndarray] = []  # type: ignore[type-arg]
    for seed, purpose in [(0, "a"), (1, "a"), (0, "b")]:
        for n in (0, 1, 2, 2**32):
            for k in (0, 1, 2, 2**32):
                generator = randomness._engine.at(stream_key(seed, purpose), n, k)
                words.append(generator.bit_generator.random_raw(4000))
    every = np.concatenate(words)
    assert len(np.unique(every)) == every.size == 48 * 4000


def test_seed_and_purpose_cannot_be_confused() -> None:
    keys = [
        stream_key(1, "2x"),
        stream_key(12, "x"),
        stream_key(1, "2x "),
        stream_key(-1, "2x"),
        stream_key(2**70, ""),
    ]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**128 for key in keys)


def test_image_ids_beyond_32_bits_differ() -> None:
    """torch's CPU generator keeps 32 bits of its seed; ours must keep all of n."""
    stream = Stream(0, "sample/noise")
    low, high = stream.batch(Draw((8,)), [5, 5 + 2**32])
    assert not torch.equal(low, high)
    first = torch.Generator().manual_seed(5)
    second = torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(8, generator=first), torch.randn(8, generator=second))  # the reason why


def test_normal_moments() -> None:
    x = Stream(0, "moments").batch(Draw((100,)), range(2000)).double().flatten()
    assert abs(x.mean()) < 4 / 200_000**0.5 and abs(x.var() - 1) < 4 * (2 / 200_000) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / 200_000) ** 0.5
    by_id = x.reshape(2000, 100)
    lag = (by_id[1:, 0] * by_id[:-1, 0]).mean()  # neighbouring ids
    assert abs(lag) < 4 / 2000**0.5


def test_uniform_and_integer_ranges() -> None:
    stream = Stream(0, "ranges")
    u = stream.batch(Draw((500,), Uniform(-1.0, 3.0)), range(200)).double()
    assert u.min() >= -1.0 and u.max() < 3.0
    assert abs(u.mean() - 1.0) < 4 * (16 / 12 / 100_000) ** 0.5 and abs(u.var() - 16 / 12) < 0.02
    narrow = Uniform(1.0, float(np.nextafter(np.float32(1.0), np.float32(2.0))))  # rounding would reach `high`
    assert set(stream.batch(Draw((500,), narrow), [0]).flatten().tolist()) == {1.0}
    i = stream.batch(Draw((500,), Integers(-2, 3)), range(20))
    assert i.unique().tolist() == [-2, -1, 0, 1, 2] and abs(i.double().mean()) < 4 * (2 / 10_000) ** 0.5


@pytest.mark.parametrize(
    "make", [lambda: Uniform(1.0, 1.0), lambda: Integers(3, 3), lambda: Uniform(0.0, float("nan"))]
)
def test_empty_ranges_are_refused(make: object) -> None:
    with pytest.raises(UserError, match="low must be below high"):
        make()  # type: ignore[operator]


def test_out_of_range_counters_are_refused() -> None:
    for n, k in [(-1, 0), (0, -1), (2**64, 0)]:
        with pytest.raises(ValueError, match="out of range"):
            Stream(0, "p").draw(Draw(), n, k)


def test_threads_do_not_disturb_each_other() -> None:
    draw, ids = Draw((64,)), range(300)
    wanted = [Stream(0, f"p{i}").batch(draw, ids) for i in range(4)]
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: Stream(0, f"p{i}").batch(draw, ids)})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(_same_bits(found[i], wanted[i]) for i in range(4))


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    Stream(0, "p").batch(Draw((5,)), range(5))
    randomness.torch_generator(0, "init")
    permutation(0, "p", 0, 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


def test_named_draws_are_streams_of_their_own() -> None:
    draws = Draws(7, "sample", torch.tensor([4, 9]))
    x = draws.take("noise", Draw((3,)), k=2)
    assert _same_bits(x, Stream(7, "sample/noise").batch(Draw((3,)), [4, 9], k=2))
    assert not torch.equal(x, draws.take("noise", Draw((3,)), k=3))
    assert not torch.equal(x, draws.take("other", Draw((3,)), k=2))
    with pytest.raises(ValueError, match="per group"):
        draws.take("mask", Draw((), Uniform(), per="group"))


def test_permutations() -> None:
    one, other = permutation(0, "order", 0, 1000), permutation(0, "order", 1, 1000)
    assert one.dtype == np.int64 and sorted(one) == list(range(1000)) == sorted(other)
    assert (one != other).any() and (one == permutation(0, "order", 0, 1000)).all()
    assert permutation(0, "order", 0, 0).shape == (0,)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1000), (0, 2), (5, 2**31), (0, 2**32), (0, 2**32 + 5), (-3, 2**40), (-(2**63), 2**63 - 1)]
)
def test_a_single_integer_is_the_first_of_an_array_of_one(low: int, high: int) -> None:
    """Single numbers take another way through numpy; checkpoints of before were drawn by this one."""
    key = randomness.stream_key(0, "one")
    found = randomness.Stream(0, "one").batch(Draw((), Integers(low, high)), range(200))
    engine = randomness._Engine()
    expected = [engine.at(key, n, 0).integers(low, high, size=1, dtype=np.int64)[0] for n in range(200)]
    assert found.tolist() == [int(value) for value in expected]
