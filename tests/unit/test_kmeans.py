"""Centroid files, assignment and Lloyd's steps: the same by faiss and torch, whole or in slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.tokenizers import kmeans
from hpc_gen.tokenizers.kmeans import Centroids, initial, lloyd


def clouds(per_cloud: int = 60, num: int = 8, width: int = 6, seed: int = 0) -> np.ndarray:
    """Points around `num` centres, shuffled."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(num, width)) * 4
    points = (centres[:, None] + generator.normal(size=(num, per_cloud, width))).reshape(-1, width)
    return generator.permutation(points).astype(np.float32)


def test_nearest_and_ties() -> None:
    centroids = Centroids(torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]]))
    features = torch.tensor([[[0.1, 0.0], [1.0, 0.0]], [[1.9, 0.0], [9.0, 9.0]]])
    codes, distances = centroids.nearest(features)
    assert codes.tolist() == [[0, 0], [1, 1]], "of equally near ones the lowest"
    assert torch.allclose(distances, torch.tensor([[0.01, 1.0], [0.01, 130.0]]), atol=1e-4)
    assert torch.equal(centroids.assign(features.half()), codes), "halves are widened first"


def test_assignment_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, centroids = torch.from_numpy(clouds()), Centroids(torch.from_numpy(clouds(seed=1)[:20]))
    whole = centroids.assign(features)
    monkeypatch.setattr(kmeans, "ASSIGN_ROWS", 7)
    assert torch.equal(centroids.assign(features), whole)
    assert torch.equal(whole, torch.cdist(features.double(), centroids.vectors.double()).argmin(1))


def test_a_file_is_the_references(tmp_path: Path) -> None:
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    sha256 = Centroids(vectors).write(tmp_path / "km_8k.npy")
    array = np.load(tmp_path / "km_8k.npy")
    assert array.dtype == np.float32 and array.shape == (5, 3) and array.flags.c_contiguous
    back = Centroids.read(tmp_path / "km_8k.npy", 3, sha256)
    assert torch.equal(back.vectors, vectors) and len(back) == 5 and back.content == Centroids(vectors).content


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "km.npy"

    def refused(words: str, **more: object) -> None:
        with pytest.raises(DataError, match=words):
            Centroids.read(path, **more)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="there are no centroids .*fit them first"):
        Centroids.read(path)
    good = np.ones((4, 3), np.float32)
    np.save(path, good)
    refused("has the SHA-256 [0-9a-f]+, not 000", sha256="0" * 64)
    refused("centroids of 3 numbers, the features have 7; they belong to another network", width=7)
    path.write_bytes(path.read_bytes()[:-5])
    refused("is not a .npy file of numbers")
    path.write_bytes(b"")
    refused("is not a .npy file of numbers")
    for wrong, words in (
        (good.astype(np.float64), r"float64 \[4, 3\], centroids are float32"),
        (good[0], r"float32 \[3\]"),
        (np.zeros((0, 3), np.float32), r"\[0, 3\]"),
        (np.full((4, 3), np.nan, np.float32), "not finite"),
    ):
        np.save(path, wrong)
        refused(words)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused("is not a .npy file of numbers")


def test_faiss_and_torch_walk_together() -> None:
    points = clouds()
    for one, other in zip(*(lloyd(points, None, 8, 6, backend=backend) for backend in ("faiss", "torch")), strict=True):
        assert one.iteration == other.iteration and one.empty == other.empty == 0
        assert np.allclose(one.centroids, other.centroids, atol=1e-5)
        assert np.isclose(one.objective, other.objective, rtol=1e-5)


def test_slices_are_the_whole_run_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    points = clouds()
    start = initial(points, 8)
    start[3] = 1e3  # nobody is nearest to it: an empty cluster is split in the first iteration
    whole = faiss.Kmeans(points.shape[1], 8, niter=7, seed=kmeans.SEED, max_points_per_centroid=len(points))
    whole.train(points, init_centroids=start)
    steps = list(lloyd(points, start, 8, 7, backend="faiss"))
    assert np.array_equal(steps[-1].centroids, whole.centroids)
    assert [step.objective for step in steps] == [float(each) for each in whole.obj]
    assert steps[0].empty == 1


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_it_goes_on_where_it_was(backend: kmeans.Backend) -> None:
    points = clouds()
    whole = list(lloyd(points, None, 8, 6, backend=backend))
    rest = list(lloyd(points, whole[2].centroids, 8, 6, first=3, backend=backend))
    assert [step.iteration for step in rest] == [3, 4, 5]
    assert np.array_equal(rest[-1].centroids, whole[-1].centroids)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_empty_clusters_are_split(backend: kmeans.Backend) -> None:
    points = clouds()
    start = initial(points, 8)
    start[5:] = 1e3
    steps = list(lloyd(points, start, 8, 12, backend=backend))
    assert steps[0].empty == 3
    assert np.bincount(Centroids(torch.from_numpy(steps[-1].centroids)).assign(torch.from_numpy(points))).min() > 0
    assert steps[-1].objective < steps[0].objective


def test_the_start_depends_on_the_seed_alone() -> None:
    points = clouds()
    assert np.array_equal(initial(points, 8), initial(points.copy(), 8))
    assert not np.array_equal(initial(points, 8), initial(points, 8, seed=1))
    assert len({row.tobytes() for row in initial(points, 100)}) == 100, "no point twice"


def test_refusals() -> None:
    points = clouds()
    with pytest.raises(UserError, match="needs at least as many vectors, got 480"):
        next(lloyd(points, None, 481))
    points[7, 2] = np.inf
    with pytest.raises(DataError, match="not finite"):
        next(lloyd(points, None, 8))


def test_poll_comes_before_each_iteration() -> None:
    calls: list[int] = []
    list(lloyd(clouds(), None, 8, 4, backend="torch", poll=lambda: calls.append(1)))
    assert len(calls) == 4
