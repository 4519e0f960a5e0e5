"""Size factors that are not the sums of the counts of the genes at hand."""

from __future__ import annotations

import numpy as np
import pytest

from ._members import fit_member, tiny_screen


@pytest.mark.parametrize("member", ["SAMSVAE", "ConditionalVAE"])
@pytest.mark.parametrize("scale", [5.0, 1e-3])
def test_no_gene_takes_up_what_a_size_factor_leaves(member, scale):
    adata = tiny_screen(n_cells=600)
    counts = adata.layers["counts"]
    total = np.asarray(counts.sum(1)).ravel()
    adata.obs["factor"] = scale * total
    model = fit_member(member, adata, setup={"size_factor_key": "factor"}, max_epochs=40)

    predicted = model.predict(["control"], n_samples=2_000).X
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    observed = np.asarray(counts[is_control].mean(0)).ravel()
    most = np.argsort(observed)[-3:]
    ratio = np.asarray(predicted.mean(0)).ravel()[most] / observed[most]
    np.testing.assert_allclose(ratio, 1, atol=0.3)
    np.testing.assert_allclose(predicted.sum() / 2_000, observed.sum(), rtol=0.15)
