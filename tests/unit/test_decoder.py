"""From a table's tokenizer to pictures: facts for the method, the decoder of its latents, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy_tokenizer
from experiments import resolved
from torch import Tensor

from hpc_gen import tokenizers
from hpc_gen.config.experiment import EncodeConfig, Experiment
from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.data.index import TableIndex
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.nn.posterior import LatentScale, mean_and_std
from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.stages.build import open_decoder, open_table, table_facts, tokenizer_identity
from hpc_gen.stages.units import Ledger
from hpc_gen.tokenizers.kl_vae_model import KlAutoencoder, initialise
from hpc_gen.tokenizers.kl_vae_weights import metadata_for
from shard_tools.encode import EncodeWorker

CPU = torch.device("cpu")
ARCHITECTURE = KlVaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=2, embed_dim=2, resolution=16)
TOY = "data.tokenizer={name: kl_vae, weights: toy}"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizers.TOKENIZERS, "kl_vae", toy_tokenizer.factory)


def experiment(*overrides: str) -> Experiment:
    return resolved("data.table=t", *overrides).experiment


def make_table(folder: Path, tokenizer: dict[str, object], column: str = "moments") -> Table:
    columns = {column: torch.zeros(4, 4, 2, 2).half(), "labels": torch.arange(4)}
    index = write_table(folder, columns, shard_rows=4, num_classes=4)
    TableIndex(index.columns, index.shards, 4, tokenizer=tokenizer).write(folder)
    return Table.open(folder)


def seed_table(folder: Path) -> None:
    """Shards without an index, which therefore do not say what made them."""
    folder.mkdir()
    columns = {name: torch.zeros(4, 4, 2, 2).half() for name in ("moments", "moments_flip")}
    torch.save({**columns, "labels": torch.arange(4)}, folder / "shard_00000.pt")


TOY_IDENTITY = toy_tokenizer.ToyTokenizer().identity


@pytest.mark.usefixtures("toy")
def test_a_decoder_of_the_tables_own_tokenizer(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", TOY_IDENTITY)
    assert table_facts(table).tokenizer == TOY_IDENTITY
    decoder = open_decoder(experiment(TOY), table, tmp_path, CPU)
    assert decoder is not None
    assert decoder.decode(torch.zeros(1, 2, 2, 2)).unique().tolist() == [128]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "other"}, "weights_sha256 = 'toy', the experiment names one with 'other'"),
        ({"scale": 2.0}, r"scale = 0\.5, the experiment names one with 2\.0"),
    ],
)
def test_another_tokenizer_is_refused_by_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    table = make_table(tmp_path / "t", TOY_IDENTITY)
    section = {"name": "kl_vae", "weights": "toy"} | changes
    text = ", ".join(f"{key}: {value}" for key, value in section.items())
    with pytest.raises(UserError, match=rf"was made by a tokenizer with {message}; give data\.tokenizer the same"):
        open_decoder(experiment(f"data.tokenizer={{{text}}}"), table, tmp_path, CPU)


@pytest.mark.usefixtures("toy")
def test_nested_fields_and_names_are_compared(tmp_path: Path) -> None:
    odd = {**TOY_IDENTITY, "architecture": {"stride": 8}}
    with pytest.raises(UserError, match=r"architecture\.stride = 8, the experiment names one with 4"):
        open_decoder(experiment(TOY), make_table(tmp_path / "a", odd), tmp_path, CPU)
    pixels = make_table(tmp_path / "b", {"name": "identity"})
    with pytest.raises(UserError, match=r"with name = 'identity', the experiment names one with 'kl_vae'"):
        open_decoder(experiment(TOY), pixels, tmp_path, CPU)


def test_pixels_need_no_decoder_and_latents_do(tmp_path: Path) -> None:
    for number, identity in enumerate(({}, {"name": "identity"})):
        table = make_table(tmp_path / str(number), identity, "pixels")
        assert open_decoder(experiment(), table, tmp_path, CPU) is None
    named = "encode={source: folder, source_path: x, image_size: 8}"
    assert open_decoder(experiment(named), table, tmp_path, CPU) is None
    latents = make_table(tmp_path / "latents", TOY_IDENTITY)
    with pytest.raises(
        UserError, match=r"made by the tokenizer 'kl_vae', .* names none to decode with; set data\.tokenizer"
    ):
        open_decoder(experiment(), latents, tmp_path, CPU)
    with pytest.raises(UserError, match=r"give encode\.tokenizer the same"):
        open_decoder(experiment(named), latents, tmp_path, CPU)


@pytest.mark.usefixtures("toy")
def test_a_table_that_does_not_say_is_the_experiments(tmp_path: Path) -> None:
    """Cached by the reference: the scale of its latents comes from data.tokenizer, and the table's identity covers it."""
    seed_table(tmp_path / "t")
    bare = open_table(tmp_path, "t")
    assert table_facts(bare).tokenizer == {} and LatentScale.of(table_facts(bare).tokenizer).scale == (1.0,)
    told = open_table(tmp_path, "t", experiment(TOY))
    assert table_facts(told).tokenizer == TOY_IDENTITY == tokenizer_identity(experiment(TOY), tmp_path)
    other = open_table(tmp_path, "t", experiment("data.tokenizer={name: kl_vae, weights: toy, scale: 2}"))
    assert len({bare.identity, told.identity, other.identity}) == 3
    assert open_decoder(experiment(TOY), told, tmp_path, CPU) is not None
    with pytest.raises(UserError, match=r"holds moments, but nobody says .* at what scale; set data\.tokenizer"):
        open_table(tmp_path, "t", experiment())
    assert tokenizer_identity(experiment(), tmp_path) == {}


# -- with the real one -------------------------------------------------------------------------------------------------


def write_weights(path: Path, seed: int = 0) -> None:
    model = KlAutoencoder(ARCHITECTURE)
    initialise(model, torch.Generator().manual_seed(seed))
    tensor_files.write_tensors(path, model.state_dict(), metadata_for(ARCHITECTURE, 0.5, 0.0))


def encode(workspace: Path, table: str, **changes: object) -> Table:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (workspace / "images" / name).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(workspace / "images" / name / f"{i}.png")
    section = {
        "source": "folder", "source_path": "images", "image_size": 16, "shard_rows": 6,
        "tokenizer": {"name": "kl_vae", "weights": "vae.safetensors"},
    }  # fmt: skip
    worker = EncodeWorker(EncodeConfig.model_validate(section | changes), workspace, {"train": table})
    book = Ledger(workspace / f"ledger-{table}", workspace)
    for unit in worker.units():
        staging = workspace / "staging" / f"{table}-{unit.name}"
        staging.mkdir(parents=True)
        book.commit(unit, worker.do(unit, staging, lambda: None), worker.fingerprint())
    worker.finish()
    return Table.open(workspace / table, verify=True)


@pytest.fixture(autouse=True)
def _determinism() -> object:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_small_kl_vae_from_images_to_images(tmp_path: Path) -> None:
    write_weights(tmp_path / "vae.safetensors")
    table = encode(tmp_path, "t")
    rows = table.read(range(10), ("moments", "moments_flip", "labels"))
    assert rows["moments"].shape == (10, 4, 8, 8) and rows["moments"].dtype == torch.float16
    assert not torch.equal(rows["moments_flip"], rows["moments"].flip(-1))
    named = experiment("data.tokenizer={name: kl_vae, weights: vae.safetensors}")
    scale = LatentScale.of(table_facts(table).tokenizer)
    assert scale.scale == (0.5,)
    decoder = open_decoder(named, table, tmp_path, CPU)
    assert decoder is not None
    mean, _ = mean_and_std(rows["moments"].float())
    images = decoder.decode(scale.normalise(mean))
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.uint8
    write_weights(tmp_path / "vae.safetensors", seed=1)
    with pytest.raises(UserError, match="weights_sha256 = "):
        open_decoder(named, table, tmp_path, CPU)
    with pytest.raises((UserError, DataError), match="absent"):
        open_decoder(experiment("data.tokenizer={name: kl_vae, weights: absent.safetensors}"), table, tmp_path, CPU)


def test_formats_agree_to_the_digits_they_keep(tmp_path: Path) -> None:
    """npz has float32 as the reference's: halves of it are what the others store, whatever rows shared a shard."""
    write_weights(tmp_path / "vae.safetensors")
    found: dict[str, dict[str, Tensor]] = {}
    for layout, rows in (("ptshard", 6), ("pt", 4), ("npz", 10)):
        table = encode(tmp_path, layout, format=layout, shard_rows=rows)
        found[layout] = table.read(range(10), ("moments", "moments_flip", "labels"))
    for key in ("moments", "moments_flip"):
        exact = found["npz"][key]
        assert exact.dtype == torch.float32 and not torch.equal(exact, exact.half().float()), (
            "rounded before it was stored"
        )
        assert torch.equal(exact.half(), found["pt"][key]) and torch.equal(exact.half(), found["ptshard"][key])


def test_sizes_that_do_not_fit_the_network(tmp_path: Path) -> None:
    write_weights(tmp_path / "vae.safetensors")
    assert encode(tmp_path, "n", image_size=10, crop_size=16).index.columns["moments"].shape == (4, 5, 5)
    with pytest.raises(DataError, match="set encode.image_size to a multiple of 2"):
        encode(tmp_path, "odd", image_size=9)
    with pytest.raises(DataError, match="set encode.channels to 3"):
        encode(tmp_path, "grey", channels=1)
