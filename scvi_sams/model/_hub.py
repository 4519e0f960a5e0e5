"""The card that a model shows on scvi-tools' hub."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import ModelCard

    from scvi_sams.model._results_mixin import ResultsMixin

__all__ = ["hub_model_card"]

_TEXT = """---
{header}
---

# {name}

{summary}

{description}

```python
# pip install scvi-sams[hub]; the file is a pickle: load only what you trust
from scvi.hub import HubModel

model = HubModel.pull_from_huggingface_hub("OWNER/NAME").model
model.get_average_treatment_effect({example})
```

## Data

{data}

Tissues: {tissues}. Training data: {training_data_url}.

Arguments of `setup_anndata`:

```json
{setup_arguments}
```

## Model

Arguments of `scvi_sams.{name}`:

```json
{model_arguments}
```

Made by: {versions}.

## References

{references}
"""


def hub_model_card(
    model: ResultsMixin,
    license_info: str,
    *,
    description: str,
    references: str,
    tissues: Sequence[str] = (),
    training_data_url: str | None = None,
) -> ModelCard:
    """Describe a model for those who find it on the hub.

    scvi-tools' own :class:`scvi.hub.HubModelCardHelper` refuses models that are not its own; the
    tags in the header are those that it would set.

    Parameters
    ----------
    model
        A trained model.
    license_info, description, references, tissues, training_data_url
        See ``save_for_hub`` of the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    made = model._provenance()
    name = made.pop("model")
    arguments = model.init_params_["non_kwargs"]
    tags = [
        "biology",
        "genomics",
        "single-cell",
        f"model_cls_name:{name}",
        f"scvi_version:{made['scvi_tools']}",
        f"anndata_version:{made['anndata']}",
        *(["modality:rna"] if model.module.is_count_model else []),
        *(f"tissue:{tissue}" for tissue in tissues),
    ]
    header = ModelCardData(license=license_info, library_name="scvi-tools", tags=tags)
    stats = model.summary_stats
    perturbations = model.perturbation_names
    text = _TEXT.format(
        header=header.to_yaml(),
        name=name,
        summary=inspect.cleandoc(type(model).__doc__ or "").split("\n\n")[0],
        description=description,
        example=json.dumps(perturbations[:1]),
        data=(
            f"{stats.n_cells:,} cells, {stats.n_vars:,} genes, {len(perturbations):,} "
            f"perturbations, {stats.n_batch:,} batches."
        ),
        tissues=", ".join(tissues) or "not told",
        training_data_url=training_data_url or "not told",
        setup_arguments=_as_json(model.registry["setup_args"]),
        model_arguments=_as_json(arguments),
        versions=", ".join(f"{key} {value}" for key, value in made.items() if key != "seed"),
        references=references,
    )
    return ModelCard(text)


def _as_json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, indent=2, default=str)
