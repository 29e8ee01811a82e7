"""The one table of contents: every public name and its home, for type checkers and, lazily, at run time."""

from . import analysis as analysis
from .analysis import (
    ablate as ablate,
    affine_lens as affine_lens,
    analyze as analyze,
    cosine_to_unembedding as cosine_to_unembedding,
    atlas as atlas,
    covariance_similarity as covariance_similarity,
    explain as explain,
    layer_rotations as layer_rotations,
    load_result as load_result,
    logit_lens as logit_lens,
    measure_task as measure_task,
    observable as observable,
    overlap as overlap,
    sufficiency as sufficiency,
)
from .capacity import MaskCapacity as MaskCapacity, could_mask_hold_it as could_mask_hold_it
from .circuit import Circuit as Circuit
from .replacement import Replacement as Replacement
from .experiments.faithfulness_curves import (
    FaithfulnessCurves as FaithfulnessCurves,
    faithfulness_curves as faithfulness_curves,
)
from .eap import export_eap as export_eap, import_eap as import_eap
from .evaluation import (
    Evaluation as Evaluation,
    SoftHardGap as SoftHardGap,
    evaluate as evaluate,
    soft_hard_gap as soft_hard_gap,
)
from .explanations.explanation import Atlas as Atlas, Explanation as Explanation
from .explanations.explanation import load_atlas as load_atlas
from .explanations.graph_files import export_graph as export_graph
from .experiments.comparison import compare as compare
from .experiments.controls import (
    RenamedTarget as RenamedTarget,
    with_random_blocks as with_random_blocks,
    with_shuffled_blocks as with_shuffled_blocks,
)
from .experiments.falsification import (
    Falsification as Falsification,
    falsify as falsify,
    load_falsification as load_falsification,
)
from .experiments.ladder import Ladder as Ladder, find_ladder as find_ladder, load_ladder as load_ladder
from .experiments.reproduced import Reproduction as Reproduction, load_reproduction as load_reproduction
from .experiments.same_function import (
    SameFunction as SameFunction,
    load_same_function as load_same_function,
    same_function as same_function,
)
from .experiments.rivals import Rivals as Rivals, load_rivals as load_rivals, rivals as rivals
from .experiments.seeds import Seeds as Seeds, load_seeds as load_seeds, over_seeds as over_seeds
from .experiments.sparsity_path import (
    SubnetworkPath as SubnetworkPath,
    find_path as find_path,
    sparsity_path as sparsity_path,
)
from .experiments.stricter import (
    StricterTests as StricterTests,
    load_stricter as load_stricter,
    stricter_tests as stricter_tests,
)
from .experiments.worst_case import worst_case_ablation as worst_case_ablation
from .learning.callbacks import Callback as Callback, TensorBoard as TensorBoard, WandB as WandB
from .learning.found import FoundCircuit as FoundCircuit, FoundSubnetwork as FoundSubnetwork
from .learning.inputs import InputWarning as InputWarning, check_inputs as check_inputs
from .learning.memory import MemoryForecast as MemoryForecast, forecast_memory as forecast_memory
from .learning.polish import Polished as Polished, polish as polish
from .learning.training import find_circuit as find_circuit, find_subnetwork as find_subnetwork
from .masking.effects import node_effects as node_effects
from .masking.apply import gated as gated, masked as masked, replaced as replaced
from .measures.statistics import Faithfulness as Faithfulness
from .models.edges import EdgeSite as EdgeSite, edge_sites as edge_sites
from .models.activations import ActivationPoint as ActivationPoint, activation_points as activation_points
from .models.dictionaries import Dictionary as Dictionary, load_dictionary as load_dictionary
from .models.identity import same_model as same_model, weight_hash as weight_hash
from .models.layouts import Layout as Layout, huggingface_layout as huggingface_layout
from .models.loading import checkpoints as checkpoints, load_model as load_model
from .models.model import Model as Model
from .models.splicing import spliced as spliced
from .models.weights import WeightSite as WeightSite, weight_sites as weight_sites
from .planted.attention import PlantedAttention as PlantedAttention, plant_attention as plant_attention
from .planted.bigram import Planted as Planted, plant_bigram as plant_bigram
from .published import import_published as import_published, load_published as load_published
from .recipe import SparsifyConfig as SparsifyConfig
from .report.comparison import write_comparison as write_comparison
from .report.curves import write_curves as write_curves
from .report.ladder import write_ladder as write_ladder
from .report.page import write_report as write_report
from .runs import InputCheck as InputCheck, Run as Run, StepRecord as StepRecord, load_run as load_run
from .scale.forecast import SweepForecast as SweepForecast, forecast_sweep as forecast_sweep
from .scale.results import Sweep as Sweep, SweepRun as SweepRun
from .scale.sweeps import load_sweep as load_sweep, merge_sweeps as merge_sweeps, sweep as sweep
from .sharing import (
    export_huggingface as export_huggingface,
    export_masks as export_masks,
    pull_subnetwork as pull_subnetwork,
    push_subnetwork as push_subnetwork,
)
from .subnetwork import Count as Count, Subnetwork as Subnetwork
from .targets.base import Target as Target
from .targets.ngram import IndexTarget as IndexTarget
from .targets.induced import InducedTarget as InducedTarget
from .targets.model import ModelTarget as ModelTarget
from .targets.next_token import NextTokenTarget as NextTokenTarget
from .tasks.rows import TaskWarning as TaskWarning, load_task as load_task
from .tasks.target import TaskTarget as TaskTarget
from .tasks.task import Task as Task
from .text.corpus import Corpus as Corpus, load_corpus as load_corpus
from .text.counting import NGramCounter as NGramCounter, count_ngrams as count_ngrams
from .text.ngrams import NGramTable as NGramTable
from .workflow import reproduce as reproduce, study as study

__version__: str
