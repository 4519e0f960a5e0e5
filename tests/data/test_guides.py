from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams._exceptions import ScreenError
from scvi_sams.data.field import registered_conditions, registered_dosage
from scvi_sams.data.guides import guide_codes, target_table

GUIDES = ["A_1", "A_2", "B_1", "NT_1"]
TARGETS = {"A_1": "A", "A_2": "A", "B_1": "B", "NT_1": "NT"}
CALLS = np.array(
    [
        [0, 0, 0, 1],  # a control
        [1, 0, 0, 0],
        [0, 1, 0, 1],  # beside a guide that does not target
        [1, 1, 0, 0],  # two guides of one target
        [0, 1, 1, 0],  # two targets
        [0, 0, 1, 0],
        [0, 0, 1, 0],
    ]
)
DOSES = np.array([[0, 0], [1, 0], [1, 0], [1, 0], [1, 1], [0, 1], [0, 1]])
NAMES_OF_CELLS = [
    [None],
    ["A_1"],
    ["A_2"],
    ["A_1+A_2"],
    ["A_2", "B_1"],
    ["B_1"],
    ["B_1"],
]


_OF_SMALL_SCREENS = (
    "No cell is a control",
    "Perturbations that no cell has apart from each other",
    "Perturbations with fewer than two cells",
)


def _adata(n_obs=7, **obs):
    counts = sparse.csr_matrix(np.ones((n_obs, 3), np.float32))
    cells = pd.DataFrame(obs, index=[f"cell{k}" for k in range(n_obs)])
    return anndata.AnnData(counts, cells)


def _registered(adata, *, silent=True, **kwargs):
    with warnings.catch_warnings():
        for message in _OF_SMALL_SCREENS if silent else ():
            warnings.filterwarnings("ignore", message, UserWarning)
        SAMSVAE.setup_anndata(adata, **({"control": "NT"} | kwargs))
    return SAMSVAE._get_most_recent_anndata_manager(adata)


def _by_calls(values=CALLS, names=GUIDES, targets=TARGETS, **kwargs):
    adata = _adata()
    adata.obsm["guides"] = pd.DataFrame(values, adata.obs_names, names)
    return _registered(adata, guide_key="guides", guide_targets=targets, **kwargs)


def _guides_of_cells(manager):
    """Names of the guides of each cell, in the order of its perturbations."""
    guides, dose = guide_codes(manager), manager.get_from_registry("dose")
    perturbation = manager.get_from_registry("perturbation")
    assert guides.codes.dtype == guides.targets.dtype == np.int32
    assert guides.codes.shape == dose.shape
    assert (guides.codes[dose == 0] == -1).all()
    known = guides.codes >= 0
    np.testing.assert_array_equal(guides.targets[guides.codes[known]], perturbation[known])
    return [
        [
            guides.names[code] if code >= 0 else None
            for code, d in zip(codes, doses, strict=True)
            if d > 0
        ]
        or [None]
        for codes, doses in zip(guides.codes, dose, strict=True)
    ]


class TestMatrix:
    @pytest.mark.parametrize(
        "storage",
        [
            np.array,
            sparse.csr_matrix,
            sparse.csc_array,
            lambda calls: calls.astype(bool),
            lambda calls: sparse.coo_matrix(calls.astype(np.float64)).tocsr(),
        ],
    )
    def test_doses_of_targets_follow(self, storage):
        adata = _adata()
        adata.obsm["guides"] = storage(CALLS)
        adata.uns["guide_names"] = np.array(GUIDES)
        adata.uns["targets"] = TARGETS
        manager = _registered(
            adata,
            guide_key="guides",
            guide_targets="targets",
            perturbation_names_uns_key="guide_names",
        )
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), DOSES)
        assert registered_conditions(manager).perturbations == ["A", "B"]
        assert _guides_of_cells(manager) == NAMES_OF_CELLS
        guides = guide_codes(manager)
        assert guides.names == ["A_1", "A_1+A_2", "A_2", "B_1"]
        np.testing.assert_array_equal(guides.targets, [0, 0, 0, 1])

    @pytest.mark.parametrize(
        "table",
        [
            TARGETS,
            pd.Series(TARGETS),
            pd.DataFrame({"target": TARGETS, "other": "x"}),
            pd.Series(TARGETS).astype("category"),
        ],
    )
    def test_frame_and_tables(self, table):
        manager = _by_calls(targets=table)
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), DOSES)
        assert _guides_of_cells(manager) == NAMES_OF_CELLS

    def test_a_frame_of_guides_under_the_same_key(self):
        adata = _adata()
        adata.obsm["guides"] = sparse.csr_matrix(CALLS)
        adata.uns["guides"] = pd.Series(TARGETS, GUIDES).to_frame("target")
        manager = _registered(adata, guide_key="guides")
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), DOSES)
        assert _guides_of_cells(manager) == NAMES_OF_CELLS

    def test_the_given_matrix_stays(self):
        adata = _adata()
        given = sparse.csr_matrix(CALLS * 7.0)
        adata.obsm["guides"] = given.copy()
        adata.uns["guides"] = pd.Series(TARGETS, GUIDES).to_frame("target")
        _registered(adata, guide_key="guides", guide_threshold=2)
        assert (adata.obsm["guides"] != given).nnz == 0

    def test_threshold(self):
        ambient = np.random.default_rng(0).integers(0, 3, CALLS.shape)
        manager = _by_calls(CALLS * 20 + ambient, guide_threshold=5)
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), DOSES)

    def test_counts_are_refused_with_what_to_do(self):
        with pytest.raises(ScreenError, match="up to 20.*crispat.*guides_from_table.*threshold=5"):
            _by_calls(CALLS * 20)

    @pytest.mark.parametrize(
        ("values", "kwargs", "message"),
        [
            (CALLS - 1.0, {}, "negative or not finite"),
            (np.where(CALLS, np.nan, 0), {}, "negative or not finite"),
            (CALLS, {"guide_threshold": 5}, "calls no guide: the largest value.* is 1"),
            (CALLS, {"guide_threshold": 0}, "guide_threshold=0 cannot be used: give a number > 0"),
            (CALLS.astype(str), {}, "not numeric: 'A_1'"),
            (CALLS * [0, 0, 0, 1], {}, "No cell has a guide that targets.*'NT_1'"),
        ],
    )
    def test_values_that_are_no_calls(self, values, kwargs, message):
        with pytest.raises(ScreenError, match=message):
            _by_calls(values, **kwargs)

    def test_targets_that_are_missed(self):
        with pytest.raises(ScreenError, match=r"target is not known \(1\): 'B_1'"):
            _by_calls(targets={k: v for k, v in TARGETS.items() if k != "B_1"})
        with pytest.raises(ScreenError, match=r"without a target.*\(1\): 'B_1'.*control label"):
            _by_calls(targets=pd.Series(TARGETS).replace("B", None))
        with pytest.raises(ScreenError, match="What do guides target"):
            _by_calls(targets=None)
        with pytest.raises(ScreenError, match="column 'target', but with 'x', 'y'"):
            _by_calls(targets=pd.DataFrame({"x": TARGETS, "y": TARGETS}))
        with pytest.raises(ScreenError, match="guides twice: 'A_1'"):
            target_table(pd.Series(["A", "B"], ["A_1", "A_1"]))
        with pytest.raises(ScreenError, match="is a list"):
            target_table(["A"])

    def test_names_that_are_missed(self):
        adata = _adata()
        adata.obsm["guides"] = CALLS
        with pytest.raises(ScreenError, match="no names.*DataFrame"):
            _registered(adata, guide_key="guides", guide_targets=TARGETS)
        adata.uns["n"] = GUIDES[:2]
        with pytest.raises(ScreenError, match="4 columns but 2 names"):
            _registered(
                adata, guide_key="guides", guide_targets=TARGETS, perturbation_names_uns_key="n"
            )
        with pytest.raises(ScreenError, match="more than once: 'A_1'"):
            _by_calls(names=["A_1", "A_1", "B_1", "NT_1"])

    def test_keys_that_are_missed(self):
        adata = _adata(guide="A_1")
        adata.obsm["guide"] = CALLS
        with pytest.raises(ScreenError, match="both a column"):
            _registered(adata, guide_key="guide", guide_targets=TARGETS)
        with pytest.raises(ScreenError, match="neither a column.*there are 'guide'"):
            _registered(adata, guide_key="gides", guide_targets=TARGETS)
        del adata.obsm["guide"]
        with pytest.raises(ScreenError, match="'table' is no key of adata.uns"):
            _registered(adata, guide_key="guide", guide_targets="table")
        with pytest.raises(ScreenError, match="of guides: name them by `guide_key`"):
            _registered(adata, perturbation_key="guide", guide_targets=TARGETS)
        with pytest.raises(ScreenError, match="column of adata.obs with names: leave it out"):
            _registered(adata, guide_key="guide", guide_targets=TARGETS, guide_threshold=3)

    def test_cells_without_a_guide_are_told_of(self):
        calls = CALLS.copy()
        calls[0] = 0
        with pytest.warns(UserWarning, match="1 cell of adata.obsm.'guides'. without a guide"):
            _by_calls(calls, silent=False)

    def test_a_construct_of_two_targets(self):
        table = TARGETS | {"B_1": "B+C", "A_2": "A+NT"}
        manager = _by_calls(targets=table)
        expected = np.column_stack([DOSES, DOSES[:, 1]])
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), expected)
        guides = guide_codes(manager)
        assert list(zip(guides.names, guides.targets.tolist(), strict=True))[-2:] == [
            ("B_1", 1),
            ("B_1", 2),
        ]
        assert _guides_of_cells(manager)[4] == ["A_2", "B_1", "B_1"]

    def test_targets_without_cells_are_no_perturbations(self):
        manager = _by_calls(
            np.column_stack([CALLS, np.zeros(len(CALLS))]),
            [*GUIDES, "Z_1"],
            TARGETS | {"Z_1": "Z"},
        )
        assert registered_conditions(manager).perturbations == ["A", "B"]

    def test_against_brute_force(self):
        rng = np.random.default_rng(1)
        names = [f"g{k}" for k in range(12)]
        table = {name: ["A", "B", "C", "D", "NT"][k % 5] for k, name in enumerate(names)}
        calls = (rng.random((len(CALLS), 12)) < 0.4).astype(int)
        calls[0] = 1
        manager = _by_calls(calls, names, table)
        perturbations = registered_conditions(manager).perturbations
        expected = [
            [
                "+".join(
                    n
                    for n, call in zip(sorted(names), row, strict=True)
                    if call and table[n] == target
                )
                for target in perturbations
                if any(
                    call and table[n] == target for n, call in zip(sorted(names), row, strict=True)
                )
            ]
            or [None]
            for row in pd.DataFrame(calls, columns=names)[sorted(names)].to_numpy()
        ]
        assert _guides_of_cells(manager) == expected


class TestMatrixThatIsNone:
    def test_shape(self):
        adata = _adata()
        adata.obsm["guides"] = CALLS[:, :, None]
        adata.uns["guides"] = pd.DataFrame(index=GUIDES)
        with pytest.raises(ScreenError, match="must be a matrix .* not of shape"):
            _registered(adata, guide_key="guides", guide_targets=TARGETS)

    @pytest.mark.parametrize("key", ["guide_key", "dosage_key"])
    def test_indices_out_of_range(self, key):
        adata = _adata()
        matrix = sparse.csr_matrix(CALLS)
        matrix.indices[2] = 10**6
        adata.obsm["guides"], adata.uns["names"] = matrix, GUIDES
        keys = {key: "guides", "perturbation_names_uns_key": "names"}
        keys |= {"guide_targets": TARGETS} if key == "guide_key" else {"control": None}
        with pytest.raises(ScreenError, match="'guides'.* has an index out of range, 1000000"):
            _registered(adata, **keys)

    def test_targets_that_are_lists(self):
        with pytest.raises(ScreenError, match="no single value, of 'A_2'"):
            _by_calls(targets=dict(zip(GUIDES, ["A", ["A", "B"], "B", "NT"], strict=True)))


class TestColumn:
    def test_guides_say_what_cells_received(self):
        guides = ["NT_1", "A_1", "A_2+NT_1", "A_2+A_1", "B_1+A_2", "B_1", "B_1+B_1"]
        manager = _registered(_adata(guide=guides), guide_key="guide", guide_targets=TARGETS)
        np.testing.assert_array_equal(registered_dosage(manager).toarray(), DOSES)
        assert _guides_of_cells(manager) == NAMES_OF_CELLS

    def test_the_control_label_is_a_guide_of_nothing(self):
        guides = ["NT", "A_1", "A_1", "A_2", "B_1", "B_1", "B_1"]
        manager = _registered(_adata(guide=guides), guide_key="guide", guide_targets=TARGETS)
        np.testing.assert_array_equal(registered_conditions(manager).cell_labels[0], "NT")

    def test_missing_guides(self):
        guides = ["NT_1", None, "A_2", "nan", "B_1", "B_1", "B_1"]
        with pytest.raises(ScreenError, match=r"without a guide.*\(2\): 'cell1', 'cell3'"):
            _registered(_adata(guide=guides), guide_key="guide", guide_targets=TARGETS)


class TestBesideLabels:
    LABELS = ("NT", "A", "NT+A", "A", "B+A", "B", "A:0.5")

    def _register(self, guides, labels=LABELS, **kwargs):
        adata = _adata(label=list(labels), guide=guides)
        return _registered(adata, perturbation_key="label", guide_key="guide", **kwargs)

    def test_in_the_order_of_the_parts(self):
        guides = ["NT_1", "A_1", "NT_1+A_2", "A_1+A_2", "B_1+A_2", None, "A_2"]
        labels = [*self.LABELS[:-1], "A"]
        manager = self._register(guides, labels)
        assert _guides_of_cells(manager) == [
            [None],
            ["A_1"],
            ["NT_1+A_2"],  # one part that is no control: all of the guide is its own
            ["A_1+A_2"],
            ["A_2", "B_1"],
            [None],
            ["A_2"],
        ]

    def test_one_construct_for_a_pair(self):
        guides = ["n", "a", "a", "a", "ab", "b", "a"]
        manager = self._register(guides, [*self.LABELS[:-1], "A"])
        assert _guides_of_cells(manager)[4] == ["ab", "ab"]
        assert guide_codes(manager).names == ["a", "ab", "ab", "b"]

    def test_doses_beside(self):
        adata = _adata(label=["NT", "A", "A", "A", "A+B", "B", "B"], dose=[0, 0, 1, 2, 1, 1, 1])
        adata.obs["dose"] = adata.obs["dose"].astype(str)
        adata.obs.loc["cell4", "dose"] = "0+2"
        adata.obs["guide"] = ["n", "a", "a", "a", "a+b", "b", "b"]
        keys = {"perturbation_key": "label", "dosage_key": "dose", "guide_key": "guide"}
        manager = _registered(adata, **keys)
        assert _guides_of_cells(manager) == [[None], [None], ["a"], ["a"], ["b"], ["b"], ["b"]]

    def test_by_the_table(self):
        guides = ["NT_1", "A_1", "A_2+NT_1", "A_1+A_2", "A_2+B_1", "B_1", "A_1"]
        manager = self._register(guides, [*self.LABELS[:-1], "A"], guide_targets=TARGETS)
        assert _guides_of_cells(manager)[2] == ["A_2"]
        assert _guides_of_cells(manager)[4] == ["A_2", "B_1"]

    def test_that_contradict_them(self):
        guides = ["NT_1", "B_1", *["A_2"] * 5]
        labels = ["NT", "A", "A", "A", "A+B", "A", "A"]
        with pytest.raises(ScreenError, match=r"does not name \(1\): 'cell1', as 'B_1' of 'B'"):
            self._register(guides, labels, guide_targets=TARGETS)
        with pytest.raises(ScreenError, match="no label names: 'Z'"):
            self._register(guides, labels, guide_targets=TARGETS | {"B_1": "Z"})
        with pytest.raises(
            ScreenError, match="has 2 parts, and the guide 'x\\+y\\+z'.*3, in cells"
        ):
            self._register(["x"] * 4 + ["x+y+z"] + ["x"] * 2, labels)

    def test_a_matrix_beside_labels_needs_targets(self):
        adata = _adata(label=["NT", "A", "A", "A", "A+B", "B", "B"])
        adata.obsm["guides"] = pd.DataFrame(CALLS, adata.obs_names, GUIDES)
        keys = {"perturbation_key": "label", "guide_key": "guides"}
        with pytest.raises(ScreenError, match="beside labels.*`guide_targets`"):
            _registered(adata, **keys)
        manager = _registered(adata, **keys, guide_targets=TARGETS)
        assert _guides_of_cells(manager) == NAMES_OF_CELLS

    def test_without_guides_there_are_none(self):
        adata = _adata(label=["NT", "A", "A", "A", "A+B", "B", "B"])
        assert guide_codes(_registered(adata, perturbation_key="label")) is None


class TestOtherCells:
    """A model's guides keep their numbers among other cells."""

    def _fitted(self):
        adata = _adata(60)
        rng = np.random.default_rng(0)
        adata.X = sparse.csr_matrix(rng.poisson(4.0, (60, 3)).astype(np.float32) + 1)
        calls = np.eye(4, dtype=int)[rng.integers(4, size=60)]
        adata.obsm["guides"] = sparse.csr_matrix(calls)
        adata.uns["guides"] = pd.Series(TARGETS, GUIDES).to_frame("target")
        _registered(adata, guide_key="guides")
        model = SAMSVAE(adata, n_latent=2, n_hidden=8)
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        return model, adata

    def test_save_load_and_transfer(self, tmp_path):
        model, adata = self._fitted()
        model.save(tmp_path / "model")
        fresh = adata.copy()
        fresh.obsm.pop("_scvi_guide")
        fresh.obsm["guides"] = fresh.obsm["guides"][:, [3, 2, 1, 0]]
        fresh.uns["guides"] = fresh.uns["guides"].iloc[::-1]
        loaded = SAMSVAE.load(tmp_path / "model", fresh)
        here, there = (guide_codes(m.adata_manager) for m in (model, loaded))
        assert here.names == there.names
        np.testing.assert_array_equal(here.codes, there.codes)
        np.testing.assert_array_equal(
            model.get_latent_representation(), loaded.get_latent_representation()
        )

    def test_a_guide_that_the_model_has_not_seen(self):
        model, adata = self._fitted()
        other = adata.copy()
        table = other.uns["guides"].rename({"A_2": "A_9"})
        other.uns["guides"] = table
        model.get_latent_representation(other)
        there = guide_codes(model.get_anndata_manager(other))
        assert there.names == guide_codes(model.adata_manager).names
        has = other.obsm["guides"].toarray()[:, 1] == 1
        assert (there.codes[has] == -1).all()
        assert (there.codes[~has & (other.obsm["_scvi_perturbation_dose"][:, 0] > 0)] >= 0).all()
        query = SAMSVAE.load_query_data(other, model)
        assert guide_codes(query.adata_manager).names == ["A_1", "A_2", "B_1", "A_9"]

    def test_new_perturbations_by_their_guides(self):
        model, adata = self._fitted()
        other = adata.copy()
        other.uns["guides"] = other.uns["guides"].replace("B", "C")
        with pytest.raises(ScreenError, match="Unknown perturbations: 'C'"):
            SAMSVAE.load_query_data(other, model)
        query = SAMSVAE.load_query_data(other, model, new_perturbations=True)
        assert query.perturbation_names == ["A", "B", "C"]
