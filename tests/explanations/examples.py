"""Explanations made by hand: small linear models whose flows and paths are known exactly."""

import numpy as np

from bigram_circuits.explanations.explanation import Atlas, CircuitPath, Edge, Explanation, Node, UnitTokens

VOCABULARY = (
    " the", " a", " this", " his", " an", " which", " course", " these", " its", " all", " their", " it", " our",
    " them", " that", " my", " one", " those", " each", " what",
)  # fmt: skip


def example(
    prompt=(" of",),
    answer=" the",
    neurons=(26, 14, 12, 8),
    heads=(0, 0, 0, 0),
    listed=60,
    most_edges=300,
    n_paths=20,
    seed=0,
):
    """An explanation of a random linear model: each value is the sum of what it reads, and the answer the last one."""
    rng = np.random.default_rng(seed)
    last = len(prompt) - 1
    parts = [("token", f"'{token}'", -1, at) for at, token in enumerate(prompt)]
    if last:
        parts += [("position", f"position {at}", -1, at) for at in range(len(prompt))]
    parts.append(("bias", "biases", -1, None))
    for layer, (n_heads, n_neurons) in enumerate(zip(heads, neurons, strict=True)):
        at = lambda: last if rng.random() < 0.5 else int(rng.integers(last + 1))  # noqa: E731
        parts += [("head", f"L{layer}H{index}", layer, at()) for index in range(n_heads)]
        parts += [("neuron", f"L{layer}N{index}", layer, at()) for index in rng.choice(3072, n_neurons, replace=False)]
    parts.append(("answer", f"'{answer}'", len(neurons), None))
    n = len(parts)
    weights = np.zeros((n, n))  # [written by, read by]
    for source, (kind, _, layer, place) in enumerate(parts):
        for target, (reader, _, later, there) in enumerate(parts):
            mixes = reader == "head" and place is not None and there is not None and place <= there
            here = place is None or place == there or (reader == "answer" and place == last)
            if (layer < later or (kind == "head" and reader == "neuron" and layer == later)) and (here or mixes):
                weights[source, target] = rng.normal(0.5, 0.7) * np.exp(rng.normal(-0.5, 1.6)) * (rng.random() < 0.45)
    inputs = np.array([1.0 if kind in ("token", "bias", "position") else 0.0 for kind, *_ in parts])
    inputs[[part[0] != "token" for part in parts]] *= 0.3
    values, slopes, strengths = inputs.copy(), np.zeros(n), np.abs(inputs)
    for target in range(n):
        values[target] += values @ weights[:, target]
        strengths[target] += strengths @ np.abs(weights[:, target])
    slopes[-1] = 1
    for source in reversed(range(n - 1)):
        slopes[source] = weights[source] @ slopes
    scale = 9.6 / values[-1]
    flows, matrix = values * slopes * scale, values[:, None] * weights * slopes[None] * scale
    strongest = np.argsort(-np.abs(flows[:-1]))[: listed - 1].tolist()
    ranked = sorted({*strongest, n - 1, *(at for at, part in enumerate(parts) if part[0] == "token")})
    keys = [f"{label}@{place}" if kind != "answer" else "answer" for kind, label, _, place in parts]
    found = [(s, t) for s in ranked for t in ranked if weights[s, t]]
    found = sorted(found, key=lambda pair: -abs(matrix[pair]))[:most_edges]
    edges = tuple(Edge(keys[s], keys[t], float(matrix[s, t])) for s, t in found)
    nodes = tuple(
        Node(
            keys[at], *parts[at], direct=float(matrix[at, -1]) if at < n - 1 else 0.0, flow=float(flows[at]),
            unseen=float(flows[at] - sum(matrix[s, at] for s, t in found if t == at)) if not inputs[at] else 0.0,
            activation=float(values[at]) if parts[at][0] == "neuron" else None,
        )
        for at in ranked
    )  # fmt: skip
    paths = sorted(all_paths(weights, inputs * scale), key=lambda pair: -abs(pair[1]))[:n_paths]
    listed_paths = tuple(
        CircuitPath(tuple(keys[at] for at in path), tuple(parts[at][1] for at in path), value) for path, value in paths
    )
    value = float(values[-1] * scale)
    terms = {keys[at]: float(matrix[at, -1]) for at in range(n - 1) if matrix[at, -1]}
    return Explanation(
        model="GPT-2 small", mask="924,639 of 84,934,656 weights (1.09%)", prompt=tuple(prompt), position=last,
        answer=f"logit of '{answer}'", value=value,
        predictions=((answer, 0.31), *((token, 0.12 / rank) for rank, token in enumerate(VOCABULARY[1:6], 1))),
        terms=terms, nodes=nodes, edges=edges, paths=listed_paths,
        left_out=value - sum(path.value for path in listed_paths),
        left_out_share=1 - sum(abs(path.value) for path in listed_paths) / float(strengths[-1] * abs(scale)),
        units={part[1]: unit(part[1], prompt[-1], rng) for part in parts if part[0] in ("neuron", "head")},
    )  # fmt: skip


def all_paths(weights, inputs):
    """Every path from an input to the last node of at most four edges, with its value."""
    end = len(inputs) - 1
    waiting = [((at,), value) for at, value in enumerate(inputs) if value]
    while waiting:
        path, value = waiting.pop()
        for target in np.flatnonzero(weights[path[-1]]):
            longer = ((*path, int(target)), value * float(weights[path[-1], target]))
            if target == end:
                yield longer
            elif len(path) < 4 and abs(longer[1]) > 0.02:
                waiting.append(longer)


def unit(label, token, rng):
    drawn = [VOCABULARY[at] for at in rng.choice(len(VOCABULARY), 12, replace=False)]
    drives = ((token, 3.1), *((word, 1.5 / rank) for rank, word in enumerate((" in", " for", " to", " from"), 1)))
    return UnitTokens(
        drives if "N" in label else (), tuple((word, 0.9 / rank) for rank, word in enumerate(drawn[:6], 1)),
        tuple((word, -0.5 / rank) for rank, word in enumerate(drawn[6:], 1)), float(rng.random() * 0.03),
    )  # fmt: skip


PROMPT = ("When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave", " to")


def prompt_example(**options):
    """A prompt of twelve tokens, with heads."""
    given = {"neurons": (6, 5, 4, 4), "heads": (3, 3, 4, 4), "listed": 60}
    return example(PROMPT, " Mary", **(given | options))


def atlas(tokens=(" of", " in", " to", " United", " New"), **options):
    """An atlas of explanations of these tokens."""
    made = [example((token,), VOCABULARY[at % 6], seed=at, **options) for at, token in enumerate(tokens)]
    units = {label: known for one in made for label, known in one.units.items()}
    bare = [Explanation(**{**vars(one), "terms": {}, "units": {}}) for one in made]
    return Atlas("What follows each token in GPT-2 small", tuple(bare), tuple(range(1000, 1000 - len(made), -1)), units)
