"""Worst-case ablation where the truth is known, and on real models: `python benchmarks/worst_case.py`.

In a planted model whose distractors lead nowhere (`closed=True`), nothing that the planted mask drops can matter: its
KL must stay near 0 whatever an adversary opens. With one planted weight or node missing it must not. Each row is a kind
of model, over several seeds: the largest KL of the planted mask over all budgets, and the smallest KL at 20 steps of
masks with one planted part missing (of weights, up to `--missing` of them, evenly spaced). A neuron of the trigram
serves one pair of tokens, so its mask is measured on text in which that pair and its reverse alternate.

`--real` measures, instead, masks of real models: learned ones for the model's own predictions (at the sizes of
`--fractions`), as usual and under an adversary (`--against 1`: `SparsifyConfig.worst_case`), and planted induction with
distractors that do reach the output. A table at the end says which part of its own information each mask keeps.
"""

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pages
import torch

import bigram_circuits as bc
from bigram_circuits.experiments.worst_case import SHUFFLED, WORST, worst_case_left, worst_case_words
from bigram_circuits.measures.words import percent
from bigram_circuits.planted.attention import KINDS
from bigram_circuits.planted.bigram import ARCHITECTURES

NAME = "benchmarks/worst_case.py"
PLANTED = {"d_vocab": 8, "successors": 1, "logits": (4.5, 4.5), "closed": True}
"""Such that every planted weight matters: a missing one costs its token, an eighth of the text, all that is known."""
FLAT, BROKEN = 0.01, 0.1
"""KL in nats that a planted mask must stay under, and that a mask with a part missing must exceed."""
JUDGED = 20

Case = tuple[bc.Model, object, object, bc.Corpus, list[tuple[object, object]]]
"""Model, planted mask, target, text, and masks with one part missing, each with the text it is measured on."""


def bigram(architecture: str, layers: int, seed: int, most: int) -> Case:
    planted = bc.plant_bigram(architecture, layers=layers, seed=seed, **PLANTED)
    places = [(name, tuple(index)) for name, mask in planted.circuit.items() for index in mask.nonzero().tolist()]
    chosen = [places[at] for at in np.unique(np.linspace(0, len(places) - 1, most).round().astype(int))]
    without = []
    for name, index in chosen:
        masks = dict(planted.circuit.items())
        masks[name][index] = False
        without.append((bc.Subnetwork(masks), planted.corpus))
    return planted.model, planted.circuit, planted.target, planted.corpus, without


def attention(kind: str, seed: int, most: int) -> Case:
    """The target is the model's own prediction, which is the planted behaviour up to a small bound."""
    planted = bc.plant_attention(kind, closed=True, seed=seed)
    labels = planted.nodes.nodes
    neurons = [one for one in labels if "N" in one]
    chosen = [neurons[at] for at in np.unique(np.linspace(0, len(neurons) - 1, most).round().astype(int)) if neurons]
    without = []
    for label in [*(one for one in labels if "N" not in one), *chosen]:
        text = planted.corpus
        if label in chosen:
            pair = divmod(int(label.split("N")[1]), planted.model.cfg.d_vocab)
            rows = np.tile(np.array(pair), (16, planted.corpus.context_length))[:, : planted.corpus.context_length]
            text = bc.Corpus.from_tokens(planted.corpus.train, rows)
        without.append((planted.nodes.drop(label), text))
    return planted.model, planted.nodes, bc.ModelTarget(planted.model), planted.corpus, without


def cases(most: int) -> Iterator[tuple[str, object]]:
    for architecture, layers in itertools.product(ARCHITECTURES, (1, 2)):
        yield (
            f"{architecture}, {layers} layer{'s' if layers > 1 else ''}, weights",
            (lambda seed, a=architecture, n=layers: bigram(a, n, seed, most)),
        )
    for kind in KINDS:
        yield f"{kind.replace('_', ' ')}, heads and neurons", lambda seed, k=kind: attention(k, seed, most)


def calibrate(seeds: Sequence[int], most: int, budgets: Sequence[int], only: str) -> list[str]:
    lines = [
        "| planted | parts | largest KL of the planted mask | masks with a part missing | smallest KL of these |",
        "|---|---|---|---|---|",
    ]
    for name, make in cases(most):
        if only not in name:
            continue
        flat, broken, kept = [], [], 0
        for seed in seeds:
            model, mask, target, corpus, without = make(seed)
            kept = mask.kept
            curves = bc.worst_case_ablation(model, mask, target, corpus, budgets)
            flat.append(curves.get("kl", WORST).max())
            for one, text in without:
                curves = bc.worst_case_ablation(model, one, target, text, (min(JUDGED, budgets[-1]),), 1, force=True)
                broken.append(curves.get("kl", WORST)[0])
        reached = "" if max(flat) < FLAT and min(broken) > BROKEN else " (not reached)"
        lines.append(f"| {name} | {kept} | {max(flat):.5f} | {len(broken)} | {min(broken):.3f}{reached} |")
        print(lines[-1], flush=True)
    return lines


def induction(distractors: float) -> tuple:
    planted = bc.plant_attention("induction", distractors=distractors)
    return (
        f"planted induction circuit, distractors {distractors:g}",
        0,
        planted.model,
        planted.nodes,
        planted.target,
        planted.corpus,
    )


def learned(name: str, text: str, fraction: float, worst_case: int, given: argparse.Namespace) -> tuple:
    model = bc.load_model(name, device="cpu")
    corpus = bc.load_corpus(text, tokenizer=model.tokenizer, context_length=given.length, max_tokens=2_000_000)
    target, title = bc.ModelTarget(model), f"{Path(name).name}-{fraction:g}-{worst_case}"
    file = given.masks and given.masks / f"{title}.safetensors"
    if file is not None and file.exists():
        mask = bc.Subnetwork.load(file)
    else:
        recipe = bc.SparsifyConfig(target_fraction=fraction, worst_case=worst_case)
        found = bc.find_subnetwork(model, target, corpus, recipe)
        mask = found.subnetwork
        print(f"\n{title}: {found.seconds:.0f} s, {found.seconds / len(found.history):.2f} s a step; {found.why}")
        if file is not None:
            mask.save(file)
    piece = bc.Corpus.from_tokens(corpus.train, corpus.held_out[: given.held_out])
    return f"{Path(name).name}, {100 * fraction:g}% of the weights", worst_case, model, mask, target, piece


def subjects(given: argparse.Namespace) -> Iterator[tuple]:
    """Masks whose worst case is measured: planted induction, then learned masks of every model and size."""
    yield from (induction(distractors) for distractors in (0.05,) if given.induction)
    for model, fraction, k in itertools.product(given.models, given.fractions, given.against):
        name, _, text = model.partition("=")
        yield learned(name, text or "reference", fraction, k, given)


def withstood(masks: Iterator[tuple], budgets: Sequence[int], starts: int) -> list[str]:
    """A table: by mask, what it tells of the context, and which share of its own information is left."""
    steps = [n for n in budgets if n]
    after = " | ".join(f"left after {n}" for n in steps)
    lines = [
        f"| mask | learned under | of the context told | {after} | {steps[-1]}, shuffled |",
        "|---" * (4 + len(steps)) + "|",
    ]
    for title, k, *known in masks:
        started = time.perf_counter()
        curves = bc.worst_case_ablation(*known, budgets, starts, force=True)
        print(f"\n{title} ({time.perf_counter() - started:.0f} s)\n{worst_case_words(curves)}", flush=True)
        left, shuffled = worst_case_left(curves), worst_case_left(curves, SHUFFLED)
        cells = [percent(max(left[n], 0.0)) for n in steps] + [percent(shuffled[steps[-1]])]
        told = curves.get("context_told", WORST)[0]
        how = f"{k} step{'s' * (k > 1)}" if k else "nothing"
        lines.append(f"| {title} | {how} | {'' if np.isnan(told) else percent(told)} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--budgets", nargs="+", type=int, default=[0, 1, 4, 20, 80])
    parser.add_argument("--missing", type=int, default=10, help="masks with a part missing, at most, of each model")
    parser.add_argument("--only", default="", help="a part of the name of the rows wanted")
    parser.add_argument("--real", action="store_true", help="masks of real models instead")
    parser.add_argument("--models", nargs="*", default=["reference"], help="with --real: models, each as NAME[=TEXT]")
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.5, 0.8, 0.9])
    parser.add_argument("--against", nargs="+", type=int, default=[0, 1], help="with --real: steps of the adversary")
    parser.add_argument("--length", type=int, default=64, help="with --real: tokens of a sequence")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=64, help="with --real: held-out sequences")
    parser.add_argument("--masks", type=Path, help="with --real: folder that keeps the masks")
    parser.add_argument("--induction", action="store_true", help="with --real: a planted induction circuit too")
    parser.add_argument("--write", type=Path, help="the page to write the table into, docs/stricter.md")
    parser.add_argument("--smoke", action="store_true", help="in seconds: only to see that it runs")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if arguments.smoke:
        calibrate([0], 1, [0, 2], "gpt2, 1")
        return
    if not arguments.real:
        lines = calibrate(arguments.seeds, arguments.missing, arguments.budgets, arguments.only)
        if arguments.write:
            pages.write(arguments.write, NAME, lines)
        return
    lines = withstood(subjects(arguments), arguments.budgets, arguments.starts)
    print("\n" + "\n".join(lines))
    if arguments.write:
        pages.write(arguments.write, f"{NAME} --real", lines)


if __name__ == "__main__":
    main()
