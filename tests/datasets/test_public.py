from __future__ import annotations

import functools
import http.server
import json
import threading
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pooch
import pytest
import scipy.sparse as sp
from anndata.io import write_elem

from scvi_sams import ScreenError, datasets

if TYPE_CHECKING:
    from pathlib import Path

FILES = {
    "norman_2019": "NormanWeissman2019_filtered.h5ad",
    "replogle_2022_k562_essential": "ReplogleWeissman2022_K562_essential.h5ad",
    "replogle_2022_rpe1": "ReplogleWeissman2022_rpe1.h5ad",
    "replogle_2022_k562_gwps": "replogle_2022_k562_gwps.h5ad",
    "papalexi_2021": "papalexi_2021.h5mu",
    "dixit_2016": "DixitRegev2016.h5ad",
    "srivatsan_2020_sciplex3": "SrivatsanTrapnell2020_sciplex3.h5ad",
}
NORMAN = FILES["norman_2019"]


def screen_of(labels, key="perturbation", dense=False, **obs) -> ad.AnnData:
    """A screen in the format of the published files, with one cell a label."""
    counts = np.arange(3 * len(labels), dtype=np.float32).reshape(len(labels), 3) % 5
    index = [f"cell{i}" for i in range(len(labels))]
    return ad.AnnData(
        counts if dense else sp.csr_matrix(counts),
        obs=pd.DataFrame({key: pd.Categorical(labels), **obs}, index=index),
        var=pd.DataFrame(index=["G1", "HLA-A", "AC1.2"]),
    )


def conditions(adata: ad.AnnData) -> list[str]:
    return adata.obs["perturbation"].tolist()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that a web server on this machine serves in place of every other."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    download = pooch.HTTPDownloader.__call__
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()

        def here(self, url, output_file, pooch):
            name = url.rsplit("/", 1)[-1]
            download(self, f"http://127.0.0.1:{httpd.server_port}/{name}", output_file, pooch)

        monkeypatch.setattr(pooch.HTTPDownloader, "__call__", here)
        yield folder
        httpd.shutdown()
        thread.join()


@pytest.fixture
def offline(monkeypatch):
    def fail(self, url, output_file, pooch):
        raise OSError("offline in the tests")

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", fail)


def fetch(cache) -> Path:
    return datasets.fetch_screen("norman_2019", cache, progressbar=False)


class TestFetch:
    @pytest.fixture
    def file(self, served):
        screen_of(["KLF1", "control"]).write_h5ad(served / NORMAN)
        return served / NORMAN

    def test_downloads_records_and_does_not_download_again(self, file, tmp_path):
        cache = tmp_path / "cache"
        path = fetch(cache)
        assert path.read_bytes() == file.read_bytes()
        record = json.loads((cache / f"{NORMAN}.json").read_text())
        assert record["size"] == file.stat().st_size
        assert len(record["sha256"]) == 64
        assert record["url"].startswith("https://")
        file.unlink()
        assert fetch(cache) == path
        assert sorted(p.name for p in cache.iterdir()) == [NORMAN, f"{NORMAN}.json"]

    @pytest.mark.parametrize("damage", ["cut off", "changed"])
    def test_a_damaged_file_is_replaced(self, damage, file, tmp_path):
        path = fetch(tmp_path / "cache")
        whole = path.read_bytes()
        path.write_bytes(whole[:1_000] if damage == "cut off" else whole + b"more")
        with pytest.warns(UserWarning, match="downloaded again"):
            assert fetch(tmp_path / "cache").read_bytes() == whole

    def test_half_a_file_that_was_never_used_is_replaced(self, file, tmp_path):
        cache = tmp_path / "cache"
        cache.mkdir()
        (cache / NORMAN).write_bytes(file.read_bytes()[:1_000])
        with pytest.warns(UserWarning, match="cut off"):
            assert fetch(cache).read_bytes() == file.read_bytes()

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"size": 3}'])
    def test_a_damaged_record_is_written_anew(self, text, file, tmp_path):
        path = fetch(tmp_path / "cache")
        record = path.with_name(f"{NORMAN}.json")
        whole = record.read_text()
        record.write_text(text)
        fetch(tmp_path / "cache")
        assert record.read_text() == whole

    def test_a_file_put_there_by_hand_is_taken(self, offline, tmp_path):
        screen_of(["KLF1", "control"]).write_h5ad(tmp_path / NORMAN)
        assert fetch(tmp_path) == tmp_path / NORMAN
        assert (tmp_path / f"{NORMAN}.json").is_file()

    def test_download_that_differs_from_the_record_is_refused(self, file, tmp_path):
        cache = tmp_path / "cache"
        fetch(cache).unlink()
        screen_of(["KLF1", "KLF1", "control"]).write_h5ad(file)
        with pytest.raises(ScreenError, match=r"recorded at its first use.*delete .*\.json"):
            fetch(cache)
        assert [p.name for p in cache.iterdir()] == [f"{NORMAN}.json"]

    def test_failure_says_what_to_do_and_leaves_nothing_behind(self, offline, tmp_path):
        with pytest.raises(datasets.DatasetUnavailableError) as caught:
            fetch(tmp_path / "cache")
        for hint in (NORMAN, str(tmp_path / "cache"), "`path=`", "SCVI_SAMS_CACHE"):
            assert hint in str(caught.value)
        assert isinstance(caught.value, ConnectionError)
        assert isinstance(caught.value, ScreenError)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_missing_page_is_a_failure(self, served, tmp_path):
        with pytest.raises(datasets.DatasetUnavailableError, match="404"):
            fetch(tmp_path)
        assert not (tmp_path / NORMAN).exists()

    def test_a_page_that_is_no_screen_is_a_failure(self, served, tmp_path):
        (served / NORMAN).write_text("<html>Please log in to the network</html>")
        with pytest.raises(datasets.DatasetUnavailableError, match="not a whole HDF5 file"):
            fetch(tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_environment_chooses_the_cache(self, file, tmp_path, monkeypatch):
        monkeypatch.setenv("SCVI_SAMS_CACHE", str(tmp_path / "mine"))
        assert fetch(None) == tmp_path / "mine" / NORMAN

    def test_an_unknown_screen_has_its_nearest_names(self):
        with pytest.raises(ScreenError, match="'norman_2018'; there is 'norman_2019'"):
            datasets.fetch_screen("norman_2018")


class TestTidy:
    def test_scperturb(self):
        labels = ["FEV_AHR", "control", "KLF1", "HLA-A_AC1.2", "control_KLF1"]
        source = screen_of(labels, gemgroup=[1, 1, 2, 2, 2])
        tidy = datasets.tidy_screen(source, "norman_2019")
        assert conditions(tidy) == ["AHR+FEV", "control", "KLF1", "AC1.2+HLA-A", "KLF1"]
        assert tidy.obs["source_label"].tolist() == labels
        assert tidy.obs["gemgroup"].tolist() == [1, 1, 2, 2, 2]
        assert tidy.obs["perturbation"].dtype == "category"
        for matrix in (tidy.X, tidy.layers["counts"]):
            assert matrix.format == "csr"
            assert matrix.dtype == np.float32
            np.testing.assert_array_equal(matrix.toarray(), source.X.toarray())
        assert not np.shares_memory(tidy.X.data, tidy.layers["counts"].data)
        assert conditions(source) == labels

    def test_single_perturbations_may_hold_the_delimiter(self):
        tidy = datasets.tidy_screen(
            screen_of(["non-targeting", "HSPA14_ENSG1"]), "replogle_2022_rpe1"
        )
        assert conditions(tidy) == ["control", "HSPA14_ENSG1"]

    def test_cells_without_a_label_are_kept_with_a_warning(self):
        source = screen_of(["control", None, "nan", "KLF1"])
        with pytest.warns(UserWarning, match="2 of 4 cells have no label"):
            tidy = datasets.tidy_screen(source, "norman_2019")
        assert tidy.n_obs == 4
        assert tidy.obs["perturbation"].isna().tolist() == [False, True, True, False]

    def test_dixit_guides_become_targets(self):
        guides = [
            "p_sgELK1_2",
            "p_sgELK1_2 + p_sgELK1_5",
            "p_sgYY1_3 + p_sgELK1_2",
            "p_INTERGENIC393453",
            "p_INTERGENIC393453 + p_sgYY1_3",
            "p-sgYY1-3_p-sgELK1-2",
            "control",
        ]
        tidy = datasets.tidy_screen(screen_of(guides), "dixit_2016")
        expected = ["ELK1", "ELK1", "ELK1+YY1", "control", "YY1", "ELK1+YY1", "control"]
        assert conditions(tidy) == expected

    def test_sciplex(self):
        source = screen_of(
            ["(+)-JQ1", "control", "Vorinostat"],
            dose_value=pd.Categorical(["10.0", None, "10000.0"]),
            cell_line=["A549", "K562", "MCF7"],
        )
        tidy = datasets.tidy_screen(source, "srivatsan_2020_sciplex3")
        assert conditions(tidy) == ["(plus)-JQ1", "control", "Vorinostat"]
        assert tidy.obs["dose"].tolist() == [10.0, 0.0, 10_000.0]
        assert tidy.obs["cell_line"].dtype == "category"

    def test_sciplex_keeps_treated_cells_without_a_dose_with_a_warning(self):
        source = screen_of(
            ["control", "Vorinostat"], dose_value=[0.0, np.nan], cell_line=["A549", "A549"]
        )
        with pytest.warns(UserWarning, match="1 treated cells have no number"):
            tidy = datasets.tidy_screen(source, "srivatsan_2020_sciplex3")
        assert tidy.obs["dose"].isna().tolist() == [False, True]

    def test_refuses_a_file_that_is_another(self):
        with pytest.raises(ScreenError, match=r"no obs\['perturbation'\]"):
            datasets.tidy_screen(screen_of(["control"], key="guide"), "norman_2019")
        with pytest.raises(ScreenError, match="is a control.*'A', 'B'"):
            datasets.tidy_screen(screen_of(["A", "B"]), "norman_2019")

        with pytest.raises(ScreenError, match=r"no obs\['dose_value'\]"):
            datasets.tidy_screen(screen_of(["control"]), "srivatsan_2020_sciplex3")

    @pytest.mark.parametrize("value", [0.5, -1.0, np.nan])
    def test_refuses_what_is_no_count(self, value):
        source = screen_of(["control", "A"], dense=True)
        source.X[1, 2] = value
        with pytest.raises(ScreenError, match="no counts.*'cell1'"):
            datasets.tidy_screen(source, "norman_2019")


def write_papalexi(path) -> None:
    """A multimodal file as pertpy hosts it: the target genes are in the shared table only."""
    rna = screen_of(["x", "y", "z"], key="orig.ident")
    shared = pd.DataFrame(
        {"gene_target": pd.Categorical(["STAT1", "NT", "JAK2"]), "replicate": ["1", "2", "1"]},
        index=rna.obs_names,
    )
    with h5py.File(path, "w") as handle:
        write_elem(handle.create_group("mod"), "rna", rna)
        write_elem(handle, "obs", shared.iloc[::-1])


class TestScreens:
    @pytest.mark.parametrize("name", FILES)
    def test_downloads_and_tidies(self, name, served, tmp_path):
        file = served / FILES[name]
        if name == "papalexi_2021":
            write_papalexi(file)
        else:
            screen_of(
                ["JAK2", "control", "STAT1"],
                dense=name.startswith("replogle"),
                dose_value=[1.0, 0.0, 2.0],
                cell_line=["A549"] * 3,
            ).write_h5ad(file)
        adata = datasets.public_screen(name, cache_dir=tmp_path / "cache", progressbar=False)
        assert sorted(conditions(adata)) == ["JAK2", "STAT1", "control"]
        assert adata.X.format == "csr"
        assert adata.shape == (3, 3)

    @pytest.mark.parametrize("name", FILES)
    def test_offline(self, name, offline, tmp_path):
        with pytest.raises(datasets.DatasetUnavailableError, match=FILES[name]):
            datasets.public_screen(name, cache_dir=tmp_path, progressbar=False)

    def test_reads_a_file_of_the_users(self, tmp_path):
        screen_of(["AHR_FEV", "control"]).write_h5ad(tmp_path / "mine.h5ad")
        adata = datasets.public_screen("norman_2019", tmp_path / "mine.h5ad")
        assert conditions(adata) == ["AHR+FEV", "control"]
        assert not (tmp_path / "mine.h5ad.json").exists()

    def test_path_that_is_no_file(self, tmp_path):
        with pytest.raises(ScreenError, match="`path` names no file"):
            datasets.public_screen("norman_2019", tmp_path / "none.h5ad")

    def test_path_that_is_no_screen(self, tmp_path):
        (tmp_path / "notes.h5ad").write_text("notes")
        with pytest.raises(ScreenError, match="notes.h5ad is not an HDF5 file, or is cut off"):
            datasets.public_screen("norman_2019", tmp_path / "notes.h5ad")

    @pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
    @pytest.mark.parametrize("marked", [True, False])
    def test_papalexi_joins_the_shared_table_by_cell(self, marked, tmp_path):
        write_papalexi(tmp_path / "papalexi.h5mu")
        if not marked:
            with h5py.File(tmp_path / "papalexi.h5mu", "a") as handle:
                handle["mod/rna"].attrs.clear()
        adata = datasets.public_screen("papalexi_2021", tmp_path / "papalexi.h5mu")
        assert conditions(adata) == ["STAT1", "control", "JAK2"]
        assert adata.obs["replicate"].tolist() == ["1", "2", "1"]

    def test_papalexi_without_rna(self, tmp_path):
        with h5py.File(tmp_path / "other.h5mu", "w") as handle:
            handle.create_group("mod/adt")
        with pytest.raises(ScreenError, match="no modality 'rna'"):
            datasets.public_screen("papalexi_2021", tmp_path / "other.h5mu")
