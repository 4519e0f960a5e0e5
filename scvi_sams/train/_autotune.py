"""What a search of hyper-parameters by scvi-tools must be told of this family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["autotune_arguments"]


def autotune_arguments(
    max_epochs: int = 40,
    *,
    model_params: Mapping[str, Any] | None = None,
    train_params: Mapping[str, Any] | None = None,
    plan_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of :func:`scvi.autotune.run_autotune` that suit the models of this family.

    Trials are compared by the validation bound of their last epoch, and none is stopped before
    (``scheduler="fifo"``). Every schedule follows the share of training that is done, and masks
    come on in its middle: a trial that lies behind there may end ahead. scvi-tools' default
    ``"asha"`` stops most trials after an epoch or two.

    By default searched: ``n_latent``, ``n_hidden`` and ``dropout_rate`` of the model and ``lr`` of
    the plan. The bound says how well a model predicts cells, not how true its masks are: leave
    ``mask_evidence_cells``, which asks for large effects instead of detectable ones, out of a
    search, and compare bounds only within one ``gene_likelihood``.

    Parameters
    ----------
    max_epochs
        Epochs of each trial.
    model_params
        Arguments of the model: values, or spaces such as ``ray.tune.choice([20, 40])``. Added to
        the defaults, and in the place of those of the same name.
    train_params
        The same for arguments of ``train``.
    plan_kwargs
        The same for arguments of :class:`~scvi_sams.train.SAMSTrainingPlan`.

    Returns
    -------
    dict
        ``metrics``, ``mode``, ``scheduler`` and ``search_space``.

    Raises
    ------
    ImportError
        If Ray is not there: ``pip install "scvi-sams[autotune]"``.
    ValueError
        If ``max_epochs`` is not positive, or ``train_params`` sets what has an argument here.

    Examples
    --------
    >>> from scvi.autotune import run_autotune  # doctest: +SKIP
    >>> search = run_autotune(  # doctest: +SKIP
    ...     scvi_sams.SAMSVAE,
    ...     adata,
    ...     num_samples=20,
    ...     seed=0,
    ...     resources={"cpu": 4},
    ...     **scvi_sams.train.autotune_arguments(max_epochs=30),
    ... )
    >>> best = search.result_grid.get_best_result("elbo_validation", "min")  # doctest: +SKIP
    >>> model = scvi_sams.SAMSVAE(adata, **best.config["model_params"])  # doctest: +SKIP
    >>> model.train(**best.config["train_params"])  # doctest: +SKIP
    """
    if max_epochs < 1:
        raise ValueError(f"max_epochs={max_epochs}: a trial needs at least one epoch.")
    if taken := sorted({"max_epochs", "plan_kwargs"} & set(train_params or {})):
        raise ValueError(f"train_params sets {taken[0]!r}: pass it as {taken[0]} itself.")
    try:
        from ray import tune
    except ImportError as error:
        raise ImportError(
            'A search needs Ray and what scvi.autotune imports: pip install "scvi-sams[autotune]".'
        ) from error
    space: dict[str, dict[str, Any]] = {
        "model_params": {
            "n_latent": tune.choice([20, 40, 60]),
            "n_hidden": tune.choice([100, 200, 400]),
            "dropout_rate": tune.choice([0.0, 0.05, 0.1]),
            **(model_params or {}),
        },
        "train_params": {
            "max_epochs": max_epochs,
            **(train_params or {}),
            "plan_kwargs": {"lr": tune.loguniform(1e-3, 8e-3), **(plan_kwargs or {})},
        },
    }
    return {
        "metrics": "elbo_validation",
        "mode": "min",
        "scheduler": "fifo",
        "search_space": space,
    }
