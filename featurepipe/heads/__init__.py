"""What is learned: estimators on features, their calibration, and the bundle that keeps one. No torch, no h5py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featurepipe.lazy_names import former_modules, lazy_names

if TYPE_CHECKING:
    from featurepipe.heads.bundle.bundle import Bundle as Bundle
    from featurepipe.heads.bundle.bundle import read_bundle as read_bundle
    from featurepipe.heads.bundle.bundle import write_bundle as write_bundle
    from featurepipe.heads.bundle.files import check_bundle_target as check_bundle_target
    from featurepipe.heads.bundle.text import bundle_text as bundle_text
    from featurepipe.heads.bundle.text import describe_bundle as describe_bundle
    from featurepipe.heads.calibration import class_scores as class_scores
    from featurepipe.heads.calibration import expected_calibration_error as expected_calibration_error
    from featurepipe.heads.calibration import fit_temperature as fit_temperature
    from featurepipe.heads.calibration import probabilities as probabilities
    from featurepipe.heads.families import FAMILIES as FAMILIES
    from featurepipe.heads.families import HEADS as HEADS
    from featurepipe.heads.families import HeadFamily as HeadFamily
    from featurepipe.heads.families import make_head as make_head
    from featurepipe.heads.kernel import RBFSVM as RBFSVM
    from featurepipe.heads.kernel import BlockKernelRidge as BlockKernelRidge
    from featurepipe.heads.linear.classifiers import BlockLinearSVC as BlockLinearSVC
    from featurepipe.heads.linear.classifiers import BlockLogisticRegression as BlockLogisticRegression
    from featurepipe.heads.linear.classifiers import fit_path as fit_path
    from featurepipe.heads.linear.lda import BlockLinearDiscriminantAnalysis as BlockLinearDiscriminantAnalysis
    from featurepipe.heads.linear.multilabel import MultilabelLinearSVC as MultilabelLinearSVC
    from featurepipe.heads.linear.multilabel import MultilabelLogisticRegression as MultilabelLogisticRegression
    from featurepipe.heads.linear.multilabel import fit_label_path as fit_label_path
    from featurepipe.heads.linear.ordinal import OrdinalLogisticRegression as OrdinalLogisticRegression
    from featurepipe.heads.linear.ridge import BlockLinearSVR as BlockLinearSVR
    from featurepipe.heads.linear.ridge import BlockRidge as BlockRidge
    from featurepipe.heads.linear.ridge import BlockRidgeClassifier as BlockRidgeClassifier
    from featurepipe.heads.linear.ridge import MultilabelRidge as MultilabelRidge
    from featurepipe.heads.multilabel import MultilabelNeighbours as MultilabelNeighbours
    from featurepipe.heads.multilabel import MultilabelTrees as MultilabelTrees
    from featurepipe.heads.neighbours import BlockCentroid as BlockCentroid
    from featurepipe.heads.neighbours import BlockNeighbours as BlockNeighbours
    from featurepipe.heads.neighbours import BlockNeighboursRegressor as BlockNeighboursRegressor
    from featurepipe.heads.preprocessing import BlockPCA as BlockPCA
    from featurepipe.heads.preprocessing import BlockScaler as BlockScaler
    from featurepipe.heads.statistics.metrics import score_table as score_table
    from featurepipe.heads.statistics.regression import conformal_half_width as conformal_half_width
    from featurepipe.heads.statistics.regression import number_table as number_table
    from featurepipe.heads.statistics.regression import quadratic_kappa as quadratic_kappa
    from featurepipe.heads.statistics.similarity import linear_cka as linear_cka
    from featurepipe.heads.statistics.transferability import h_score as h_score
    from featurepipe.heads.statistics.transferability import log_me as log_me
    from featurepipe.heads.statistics.transferability import log_me_of_numbers as log_me_of_numbers
    from featurepipe.heads.statistics.transferability import transfer_scores as transfer_scores
    from featurepipe.heads.trees.boosted import BoostedRegressor as BoostedRegressor
    from featurepipe.heads.trees.boosted import BoostedTrees as BoostedTrees

_HOMES = {
    "FAMILIES": "families",
    "HEADS": "families",
    "RBFSVM": "kernel",
    "BlockCentroid": "neighbours",
    "BlockKernelRidge": "kernel",
    "BlockLinearSVC": "linear.classifiers",
    "BlockLinearSVR": "linear.ridge",
    "BlockLogisticRegression": "linear.classifiers",
    "BlockPCA": "preprocessing",
    "BlockScaler": "preprocessing",
    "BlockLinearDiscriminantAnalysis": "linear.lda",
    "BlockNeighbours": "neighbours",
    "BlockNeighboursRegressor": "neighbours",
    "BlockRidge": "linear.ridge",
    "BlockRidgeClassifier": "linear.ridge",
    "BoostedRegressor": "trees.boosted",
    "BoostedTrees": "trees.boosted",
    "Bundle": "bundle.bundle",
    "HeadFamily": "families",
    "MultilabelLinearSVC": "linear.multilabel",
    "MultilabelLogisticRegression": "linear.multilabel",
    "MultilabelNeighbours": "multilabel",
    "MultilabelRidge": "linear.ridge",
    "MultilabelTrees": "multilabel",
    "OrdinalLogisticRegression": "linear.ordinal",
    "bundle_text": "bundle.text",
    "check_bundle_target": "bundle.files",
    "class_scores": "calibration",
    "conformal_half_width": "statistics.regression",
    "describe_bundle": "bundle.text",
    "expected_calibration_error": "calibration",
    "fit_label_path": "linear.multilabel",
    "fit_path": "linear.classifiers",
    "fit_temperature": "calibration",
    "h_score": "statistics.transferability",
    "linear_cka": "statistics.similarity",
    "log_me": "statistics.transferability",
    "log_me_of_numbers": "statistics.transferability",
    "make_head": "families",
    "number_table": "statistics.regression",
    "probabilities": "calibration",
    "quadratic_kappa": "statistics.regression",
    "read_bundle": "bundle.bundle",
    "score_table": "statistics.metrics",
    "transfer_scores": "statistics.transferability",
    "write_bundle": "bundle.bundle",
}
__all__ = list(_HOMES)

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
former_modules(
    __name__,
    {
        "boosted": "trees.boosted",
        "kernel_ridge": "kernel",
        "lda": "linear.lda",
        "linear.svr": "linear.ridge",
        "linear_svc": "linear.classifiers",
        "logistic": "linear.classifiers",
        "pca": "preprocessing",
        "ridge": "linear.ridge",
        "row_space": "preprocessing",
        "scaling": "preprocessing",
    },
)
