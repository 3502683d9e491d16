"""Images that are not tables (folders, .npz) as reference and for statistics; statistics files of other programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_run

from eval_jobs.statistics import StatisticsJob, make_statistics
from hpc_gen.data import image_files
from hpc_gen.metrics import fidelity, statistics
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.images import png_bytes

PIXELS = torch.randint(0, 256, (6, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def _folder(path):
    for i, image in enumerate(PIXELS):
        target = path / f"class{i % 2}" / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png_bytes(image))
    return path


ORDER = [0, 2, 4, 1, 3, 5]  # of the files by path


def test_a_folder_and_both_kinds_of_npz_hold_the_same_images(tmp_path):
    images = PIXELS.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "stored.npz", arr_0=images, arr_1=np.arange(6))
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    stored, small = (image_files.open_images(tmp_path / name) for name in ("stored.npz", "small.npz"))
    folder = image_files.open_images(_folder(tmp_path / "folder"))
    for found in (stored, small, folder):
        assert found.rows == 6 and found.shape == (3, 5, 7)
    assert torch.equal(stored.read([3, 1]), PIXELS[[3, 1]]) and torch.equal(small.read([3, 1]), PIXELS[[3, 1]])
    assert torch.equal(folder.read(range(6)), PIXELS[ORDER])
    assert isinstance(stored._images, np.memmap)  # as large as it may be, it is not read whole
    assert len({found.identity for found in (stored, small, folder)}) == 3
    assert folder.name(1).endswith("class0/2.png") and stored.name(2) == f"image 2 of {tmp_path / 'stored.npz'}"


def test_grey_images_become_colour_ones(tmp_path):
    np.savez(tmp_path / "grey.npz", arr_0=PIXELS[:, :1].permute(0, 2, 3, 1).numpy())
    assert torch.equal(image_files.open_images(tmp_path / "grey.npz").read([0]), PIXELS[:1, :1].expand(-1, 3, -1, -1))


def test_damaged_and_wrong_files_are_named(tmp_path):
    folder = _folder(tmp_path / "folder")
    path = folder / "class1" / "3.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"class1/3\.png cannot be read as an image"):
        image_files.open_images(folder).read(range(6))
    path.write_bytes(png_bytes(torch.zeros(3, 5, 8, dtype=torch.uint8)))
    with pytest.raises(DataError, match=r"class1/3\.png is 8 x 5 pixels, .*class0/0\.png 7 x 5; bring all"):
        image_files.open_images(folder).read(range(6))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image files"):
        image_files.open_images(tmp_path / "empty")
    with pytest.raises(UserError, match="neither a folder of images nor an .npz file"):
        image_files.open_images(tmp_path / "none")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3))
    with pytest.raises(DataError, match=r"has no 'arr_0' \(it has: mu\)"):
        image_files.open_images(tmp_path / "mu.npz")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(DataError, match=r"'arr_0' is float64 \[2, 4, 4, 3\], not uint8 images"):
        image_files.open_images(tmp_path / "float.npz")
    (tmp_path / "torn.npz").write_bytes((tmp_path / "float.npz").read_bytes()[:100])
    with pytest.raises(DataError, match=r"torn\.npz cannot be read as \.npz"):
        image_files.open_images(tmp_path / "torn.npz")


def test_statistics_of_files_are_those_of_the_table(tmp_path):
    """`metrics stats` takes any set of images; with spatial features it writes ADM's four keys."""
    toy_run.write_table(tmp_path / "table", channels=3, size=8)
    from hpc_gen.stages.build import open_table

    pixels = open_table(tmp_path, "table").read(np.arange(32), ["pixels"])["pixels"]
    np.savez(tmp_path / "images.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(pixels):
        (tmp_path / "folder" / f"{i:03d}.png").write_bytes(png_bytes(image))
    found = []
    for source in ("table", "images.npz", "folder"):
        path = tmp_path / f"{source}-stats.npz"
        make_statistics(StatisticsJob(source, path, "random-conv", spatial=True), tmp_path, lambda line: None)
        found.append(statistics.read(path))
    for each in found[1:]:
        assert torch.equal(each.mean, found[0].mean) and torch.equal(each.covariance, found[0].covariance)
        assert torch.equal(each.spatial.covariance, found[0].spatial.covariance)
    assert set(np.load(tmp_path / "table-stats.npz").files) == {"mu", "sigma", "mu_s", "sigma_s", "provenance"}
    assert "images" in found[1].provenance and "table" in found[0].provenance
    with pytest.raises(UserError, match=r"metrics stats\.rows is 99, but .*images\.npz has 32 images"):
        make_statistics(StatisticsJob("images.npz", tmp_path / "a.npz", "random-conv", rows=99), tmp_path, print)


def test_caches_of_torch_fidelity_are_read_without_pickle(tmp_path):
    save = fidelity._module("utils_torch").torch_atomic_save
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    made = fidelity._module("metric_fid").fid_features_to_statistics(features)
    save(made, str(tmp_path / "cifar10-inception-stat-fid-2048.pt"))
    save(features, str(tmp_path / "cifar10-inception-features-2048.pt"))
    stat = statistics.read(tmp_path / "cifar10-inception-stat-fid-2048.pt")
    full = statistics.read(tmp_path / "cifar10-inception-features-2048.pt")
    np.testing.assert_array_equal(stat.covariance.numpy(), made["sigma"])
    np.testing.assert_array_equal(stat.mean.numpy(), made["mu"].astype(np.float64))
    np.testing.assert_allclose(full.covariance.numpy(), made["sigma"], rtol=1e-6, atol=1e-8)
    assert stat.count is None and full.count == 50 and stat.provenance is None
    torch.save({"mu": "a word"}, tmp_path / "odd.pt")
    with pytest.raises(DataError, match="neither statistics nor features of torch-fidelity"):
        statistics.read(tmp_path / "odd.pt")
    torch.save({"mu": "a", "sigma": [1]}, tmp_path / "text.pt")
    with pytest.raises(DataError, match="holds an array that cannot be read"):
        statistics.read(tmp_path / "text.pt")


def test_files_of_adm_and_edm(tmp_path):
    """ADM: mu, sigma, mu_s, sigma_s beside arr_0; EDM and the seed's fid_stats: mu, sigma."""
    generator = np.random.RandomState(0)
    mu, sigma = generator.randn(4), np.eye(4) * 2
    images = PIXELS.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3])
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    adm, edm = statistics.read(tmp_path / "adm.npz"), statistics.read(tmp_path / "edm.npz")
    assert adm.spatial is not None and adm.spatial.covariance.shape == (3, 3) and edm.spatial is None
    assert torch.equal(adm.covariance, edm.covariance)
    np.savez(tmp_path / "images.npz", arr_0=images)
    with pytest.raises(
        DataError, match=r"no keys 'mu' and 'sigma' \(it has: arr_0\); it holds images: name it in eval"
    ):
        statistics.read(tmp_path / "images.npz")
    np.savez(tmp_path / "bad.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=np.full((4, 4), np.nan))
    with pytest.raises(DataError, match="'sigma_s' holds NaN or infinity"):
        statistics.read(tmp_path / "bad.npz")
