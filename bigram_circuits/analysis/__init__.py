"""What a subnetwork does inside the model: functions of (model, subnetwork) that return frozen results.

Every analysis measures the full model and, if a subnetwork is given, the subnetwork, its complement and a matched
random subnetwork on the same text.

| question | functions |
|---|---|
| what would each layer predict? | `logit_lens`, `affine_lens` (`fit_affine_lens`, `refine_affine_lens`) |
| where does the residual stream point, how do layers rotate it? | `cosine_to_unembedding`, `layer_rotations`, `covariance_similarity` |
| what is necessary? | `ablate`, `stochastic_ablation` |
| how well does it do a task? | `measure_task` |
| what is sufficient? | `sufficiency`, with the tasks of `TASKS` |
| what do the latents of a dictionary write? | `feature_tokens` |
| how does a prediction come about, from token in to token out? | `explain`; for many tokens `atlas` |
| what does a neuron or head do, and does the picture predict it? | `unit_effects`, `neuron_map`, `neurons_used`, `predicted_effects` |
| which directions count for a token, or for a choice? | `observable`, `pulled_back`, `norm_effect`, `coupling` |
| which components write the prediction, where do heads attend? | `logit_attribution`, `attention_patterns`, `head_scores`, `retrieval_scores`, `successor_scores` |
| where are the kept weights? | `by_layer`, `by_matrix`, `by_head`, `by_neuron`, `concentration`, `whole_neurons`, `max_activating_tokens` |
| is it the same as another? | `overlap`, `overlaps` |
| how does it develop over training? | `trajectory`, `subnetworks_over_training` |
| how does it read a text, after which tokens is it faithful? | `passages`, `next_tokens`, `faithfulness_by_token` |
| after which tokens is a single weight needed? | `why_weight` |
| all of these at once | `analyze`, `layer_by_layer` |
"""  # noqa: E501

from bigram_circuits.analysis.ablation import ablate, stochastic_ablation
from bigram_circuits.analysis.affine import AffineMaps, fit_affine_lens, refine_affine_lens
from bigram_circuits.analysis.atlas import atlas
from bigram_circuits.analysis.attribution import attention_patterns, logit_attribution
from bigram_circuits.analysis.explaining import explain
from bigram_circuits.analysis.features import FeatureTokens, feature_tokens
from bigram_circuits.analysis.geometry import (
    cosine_to_unembedding,
    covariance_cosine,
    covariance_similarity,
    layer_rotations,
    linear_cka,
)
from bigram_circuits.analysis.heads import head_scores, retrieval_scores, successor_scores
from bigram_circuits.analysis.layers import layer_by_layer
from bigram_circuits.analysis.lens import affine_lens, logit_lens
from bigram_circuits.analysis.location import (
    by_head,
    by_layer,
    by_matrix,
    by_neuron,
    concentration,
    exciting_tokens,
    max_activating_tokens,
    whole_neurons,
)
from bigram_circuits.analysis.neurons import neuron_map, neurons_used
from bigram_circuits.analysis.observables import (
    Direction,
    Observable,
    coupling,
    norm_effect,
    observable,
    pulled_back,
)
from bigram_circuits.analysis.overlap import overlap, overlaps
from bigram_circuits.analysis.prediction import predicted_effects
from bigram_circuits.analysis.reading import faithfulness_by_token, next_tokens, passages
from bigram_circuits.analysis.sufficiency import sufficiency
from bigram_circuits.analysis.suite import Analyses, analyze
from bigram_circuits.analysis.task_scores import measure_task
from bigram_circuits.analysis.trajectories import faithfulness_to, subnetworks_over_training, trajectory
from bigram_circuits.analysis.units import unit_effects
from bigram_circuits.analysis.why_weight import WeightRoles, why_weight
from bigram_circuits.explanations.explanation import Atlas, Explanation
from bigram_circuits.measures.quantities import Quantity
from bigram_circuits.measures.results import Curves, Effects, Maps, Result, Scatter, load_result
from bigram_circuits.tasks.builtin import (
    TASKS,
    earlier_value,
    greater_than,
    indirect_object,
    ordered_sequences,
    repeated_random_tokens,
)
from bigram_circuits.tasks.task import Ability, Task, ability

__all__ = [
    "TASKS",
    "Ability",
    "AffineMaps",
    "Analyses",
    "Atlas",
    "Curves",
    "Direction",
    "Effects",
    "Explanation",
    "FeatureTokens",
    "Maps",
    "Observable",
    "Quantity",
    "Result",
    "Scatter",
    "Task",
    "WeightRoles",
    "ability",
    "ablate",
    "affine_lens",
    "analyze",
    "atlas",
    "attention_patterns",
    "by_head",
    "by_layer",
    "by_matrix",
    "by_neuron",
    "concentration",
    "cosine_to_unembedding",
    "coupling",
    "covariance_cosine",
    "covariance_similarity",
    "earlier_value",
    "exciting_tokens",
    "explain",
    "faithfulness_by_token",
    "faithfulness_to",
    "feature_tokens",
    "fit_affine_lens",
    "greater_than",
    "head_scores",
    "indirect_object",
    "layer_by_layer",
    "layer_rotations",
    "linear_cka",
    "load_result",
    "logit_attribution",
    "logit_lens",
    "max_activating_tokens",
    "measure_task",
    "neuron_map",
    "neurons_used",
    "next_tokens",
    "norm_effect",
    "observable",
    "ordered_sequences",
    "overlap",
    "overlaps",
    "passages",
    "predicted_effects",
    "pulled_back",
    "refine_affine_lens",
    "repeated_random_tokens",
    "retrieval_scores",
    "stochastic_ablation",
    "subnetworks_over_training",
    "successor_scores",
    "sufficiency",
    "trajectory",
    "unit_effects",
    "whole_neurons",
    "why_weight",
]
