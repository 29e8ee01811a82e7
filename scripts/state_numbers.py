"""State the numbers of the README and the docs: `python scripts/state_numbers.py` (about an hour on one core).

It makes the default run with `falsify` (or reads a finished one: `--run FOLDER`), writes what it measured to
docs/numbers.json, and writes these numbers into the sentences and table rows of `STATED`. `--outside NORMAL THOROUGH`
reads two runs on a model that was not made here, one of the default recipe and one with `--effort thorough`, for the
second table of docs/results.md. With `--check`, nothing is run or written: it says where a page states another number
than docs/numbers.json.

The tests compare the pages with docs/numbers.json; those marked slow, which .ci/run runs,
compare docs/numbers.json with a run of their own.
"""

import argparse
import json
import math
import re
import string
import tempfile
from pathlib import Path
from typing import Any

import bigram_circuits as bc
from bigram_circuits.experiments.controls import RANDOM_BLOCKS, RANDOM_MODEL, SHUFFLED
from bigram_circuits.experiments.falsification import load_falsification
from bigram_circuits.experiments.verdicts import FOUND, NONSENSE, TRAINED, free_name, seeds_of
from bigram_circuits.runs import Run

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "docs" / "numbers.json"
_WORDS = r"[^|,\n]+?"
_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?%?"


def _row(words: str, key: str, kept: str, bold: str = "") -> str:
    r, kl = (f"{bold}{{{name}[{key}]:{digits}}}{bold}" for name, digits in (("r", ".3f"), ("kl", ".2f")))
    return f"| {words} | {r} | {kl} | {{loss[{key}]:.2f}} | {kept} |"


def _lens(words: str, key: str, bold: int | None = None) -> str:
    cells = [f"{{lens_{key}[{place}]:.2f}}" for place in range(5)]
    return f"| {words} | {' | '.join(f'**{cell}**' if at == bold else cell for at, cell in enumerate(cells))} |"


def _untrained(words: str, key: str) -> str:
    cells = " | ".join(f"{{falsified[{key}][{name}]:{digits}}}" for name, digits in (("r", ".3f"), ("kl", ".2f")))
    return f"| {words} | {cells} | {{falsified[{key}][loss]:.2f}} | {{falsified[{key}][kept]:,}} |"


def _outside(words: str, effort: str, row: str, bold: str = "") -> str:
    at = f"outside[{effort}][{row}]"
    cells = [f"{bold}{{{at}[{name}]:{digits}}}{bold}" for name, digits in (("r", ".3f"), ("kl", ".2f"))]
    return f"| {words} | {' | '.join(cells)} | {{{at}[loss]:.2f}} | {{{at}[kept]:,}} ({{{at}[fraction]:.2%}}) |"


def _by_size(words: str, key: str) -> str:
    cells = [f"{{equal_size[kl][{key}][{at}]:.2f}}" for at in range(3)]
    return f"| {words} | {' | '.join(cells)} | {{ceilings[{key}][kl]:.2f}} ({{ceilings[{key}][fraction]:.0%}}) |"


STATED: dict[str, tuple[str, ...]] = {
    "README.md": (
        "| kept: {kept:,} of {total:,} weights ({fraction:.2%}) | r |",
        "| **the subnetwork** | **{r[subnetwork]:.3f}** |",
        "| the same recipe on blocks that were never trained | {falsified[blocks][r]:.3f} |",
        "| the largest weights, as many | {r[magnitude]:.3f} |",
        "| random weights, as many | {r[random]:.3f} |",
        "at least {size_ratio:.1f} times as many weights",
        "without them its loss rises by {rise:.2f} nats, without as many random ones by {random_rise:.2f}",
    ),
    "docs/results.md": (
        _row("**subnetwork**", "subnetwork", "{kept:,} ({fraction:.2%})", "**"),
        _untrained("re-initialised blocks between the trained embeddings", "blocks"),
        _untrained("trained weights, shuffled within every matrix", "shuffled"),
        _untrained("everything re-initialised", "everything"),
        _row("full model", "full", "{total:,}"),
        _row("magnitude (largest weights, as many)", "magnitude", "{kept:,}"),
        _row("matched random weights", "random", "{kept:,}"),
        _row("complement (full model without the subnetwork)", "complement", "{kept_by_complement:,}"),
        _row("full model without matched random weights", "full - random", "{kept_by_complement:,}"),
        "{in_first_mlp:.0%} of the kept weights are in the first MLP, {in_attention:.0%} in attention. Dropping them "
        "raises the model's loss by {rise:.2f} nats; dropping as many random weights raises it by {random_rise:.2f}.",
        _lens("full model", "full", 1),
        _lens("subnetwork", "subnetwork", 1),
        _lens("complement", "complement"),
        _lens("matched random weights", "random"),
        "At equal size it is ahead of re-initialised blocks by {gaps[blocks][kl][gap]:.3f} nats (95% interval "
        "{gaps[blocks][kl][low]:.3f} to {gaps[blocks][kl][high]:.3f}; over four seeds {gaps[blocks][range][0]:.3f} to "
        "{gaps[blocks][range][1]:.3f})",
        "of shuffled weights by {gaps[shuffled][kl][gap]:.3f} ({gaps[shuffled][kl][low]:.3f} to "
        "{gaps[shuffled][kl][high]:.3f}).",
        "To reach its KL, re-initialised blocks need at least {size_ratio:.1f} times its weights.",
        "| KL by weights kept | {equal_size[sizes][0]:.2%} | {equal_size[sizes][1]:.2%} | {equal_size[sizes][2]:.2%} "
        "| no penalty (share kept) |",
        _by_size("trained", "trained"),
        _by_size("re-initialised blocks", "blocks"),
        "a mask of {capacity[mask_bits]:,.0f} bits can hold more than the {capacity[table_bits]:,.0f} in which a "
        "bigram table as good as this was written",
        "a nonsense target (the bigram table with all tokens renamed) they recover {falsified[nonsense][told]:.0%} of "
        "what the context tells, against {falsified[found][told]:.0%}",
        "Seeds agree on the weights (Jaccard {seeds[jaccard]:.0%}, {seeds[times_chance]:.0f} times chance)",
        "the trained model *needs* these weights ({rise:.2f} nats against {random_rise:.2f} for random ones)",
        _outside("**subnetwork, thorough**", "thorough", "subnetwork", "**"),
        _outside("subnetwork, default", "normal", "subnetwork"),
        _outside("full model", "normal", "full"),
        _outside("magnitude (as many as the thorough one)", "thorough", "magnitude"),
        _outside("matched random weights (as many)", "thorough", "random"),
        _outside("complement of the thorough one", "thorough", "complement"),
        "The thorough recipe takes {outside[thorough][steps]:,} steps, the default took {outside[normal][steps]:,}.",
    ),
    "docs/method.md": (
        "`thorough` reaches a KL of {outside[thorough][subnetwork][kl]:.2f} with "
        "{outside[thorough][subnetwork][fraction]:.2%} of the weights, and `normal` "
        "{outside[normal][subnetwork][kl]:.2f} with {outside[normal][subnetwork][fraction]:.2%}.",
        "For the reference model and {falsified_recipe:s}, at {fraction:.2%} of the weights, re-initialised blocks "
        "reach {falsified[blocks][of_found]:.0%} of the subnetwork's share "
        "({falsified[blocks][told]:.0%} against {falsified[found][told]:.0%}).",
        "loss rises by {rise:.2f} nats without these weights, and by {random_rise:.2f} without matched random ones.",
    ),
    "docs/explain.md": (
        "After ' of', the reference model with only {kept:,} of {total:,} weights ({fraction:.2%}) predicts ' the' "
        "({explained[probability]:.0%}).",
        "The logit of ' the' is {explained[value]:.2f}: 20 paths add up to {explained[listed]:.2f} of it; what is left "
        "out is {explained[left_out]:.0%} of all paths' strength.",
        "{explained[paths][0]:+.3f}  biases -> ' the'",
        "{explained[paths][1]:+.3f}  ' of' -> L0N107 -> ' the'",
        "{explained[paths][2]:+.3f}  ' of' -> L0N28 -> ' the'",
        "{explained[paths][3]:+.3f}  ' of' -> L0N954 -> ' the'",
        "{explained[paths][4]:+.3f}  ' of' -> L0N997 -> ' the'",
        "{explained[paths][5]:+.3f}  ' of' -> L0N398 -> ' the'",
        "{explained[paths][6]:+.3f}  ' of' -> L0N235 -> ' the'",
        "{explained[paths][7]:+.3f}  ' of' -> ' the'",
    ),
    "docs/cost.md": (
        "On the reference model: r {r[subnetwork]:.3f} at {fraction:.2%} of the weights, KL {kl[subnetwork]:.3f}, "
        "after {steps} steps;",
    ),
    "docs/analyses.md": (
        "| L2H2 | {induction[L2H2][fall]:.2f} nats ({induction[L2H2][low]:.2f} to {induction[L2H2][high]:.2f}) | "
        "{induction[L2H2][random]:.2f} |",
        "| L3H3 | {induction[L3H3][fall]:.2f} ({induction[L3H3][low]:.2f} to {induction[L3H3][high]:.2f}) | "
        "{induction[L3H3][random]:.2f} |",
        "| both | {induction[both][fall]:.2f} ({induction[both][low]:.2f} to {induction[both][high]:.2f}), from "
        "{induction_loss[base]:.2f} to {induction[both][loss]:.2f} | {induction[both][random]:.2f} |",
        "and the full model reaches {induction_loss[full]:.2f}: the circuit",
        "Of the {kept:,} weights of the reference model's bigram subnetwork, {largest[shared]:,.0f} are also among the "
        "largest of their matrices; chance would give {largest[expected]:,.0f}.",
    ),
}
"""By page, the sentences and rows that state a number, with the place of each; a space may be a line break there."""


def measured(run: Run) -> dict[str, Any]:
    """The numbers of a run that was evaluated and analysed."""
    assert run.evaluation is not None
    rows, subnetwork = dict(run.evaluation.rows()), run.subnetwork
    counts = subnetwork.by_component()
    rise, random_rise = run.evaluation.necessity
    analyses: dict[str, Any] = dict(run.analyses)
    lens, largest = analyses["logit_lens"], analyses["overlap_magnitude"]
    heads, pairs = analyses["induction"], analyses["induction_pairs"]
    found = {
        "kept": subnetwork.kept,
        "total": subnetwork.total,
        "kept_by_complement": subnetwork.total - subnetwork.kept,
        "fraction": subnetwork.fraction,
        "steps": len(run.history),
        "r": {name: row.surprisal_correlation for name, row in rows.items()},
        "kl": {name: row.kl for name, row in rows.items()},
        "loss": {name: row.mean_surprisal for name, row in rows.items()},
        "rise": rise,
        "random_rise": random_rise,
        "in_first_mlp": counts[0, "mlp"].kept / subnetwork.kept,
        "in_attention": sum(n.kept for (_, part), n in counts.items() if part == "attn") / subnetwork.kept,
        "induction": {
            "L2H2": _effect(heads, "L2H2"), "L3H3": _effect(heads, "L3H3"),
            "both": _effect(pairs, next(name for name in pairs.names if set(name.split(" + ")) == {"L2H2", "L3H3"})),
        },
        "induction_loss": {name: heads.notes[f"loss_of_{name}"] for name in ("base", "full")},
        "largest": {"shared": largest.get("intersection")["all"], "expected": largest.get("expected")["all"]},
    }  # fmt: skip
    explained = bc.explain(bc.load_model("reference", device="cpu"), subnetwork, " of")
    assert explained.predictions[0][0] == " the"
    found["explained"] = {
        "value": explained.value,
        "probability": explained.predictions[0][1],
        "listed": explained.value - explained.left_out,
        "left_out": explained.left_out_share,
        "paths": [path.value for path in explained.paths[:8]],
    }
    if held := run.evaluation.mask_capacity:
        found["capacity"] = {"mask_bits": held.mask_bits, "table_bits": held.table_bits, "ratio": held.ratio}
    for name in ("full", "subnetwork", "complement", "random"):
        found[f"lens_{name}"] = lens.get("surprisal_correlation", name).tolist()
    return found | _falsified(run)


def _effect(effects: Any, name: str) -> dict[str, float]:
    at = effects.names.index(name)
    keys = {"fall": "fall_in_loss", "random": "random_fall", "loss": "loss"}
    ends = {"low": float(effects.low[0, at]), "high": float(effects.high[0, at])}
    return {word: effects.get(key)[name] for word, key in keys.items()} | ends


def _falsified(run: Run) -> dict[str, Any]:
    """What `falsify` measured; nothing if it was not run."""
    tried = load_falsification(run.path / "falsify", run)
    if tried is None:
        return {}
    columns = {"r": "surprisal_correlation", "kl": "kl", "loss": "mean_surprisal", "fraction": "fraction"}
    columns["told"] = "context_told"
    values = {word: tried.controls.get(key) for word, key in columns.items()}
    names = {"found": FOUND, "blocks": RANDOM_BLOCKS, "everything": RANDOM_MODEL, "shuffled": SHUFFLED}
    names["nonsense"] = NONSENSE
    rows = {word: {key: of[name] for key, of in values.items()} for word, name in names.items()}
    for row in rows.values():
        row["kept"] = round(row["fraction"] * run.subnetwork.total)
        row["of_found"] = row["told"] / rows["found"]["told"]
    others = [name for name in seeds_of(tried.controls.names) if name != FOUND]
    seeds: dict[str, Any] = {key: [f(of[name] for name in others) for f in (min, max)] for key, of in values.items()}
    seeds["told_mean"] = sum(values["told"][name] for name in others) / len(others)
    together, expected = tried.seeds.get("jaccard"), tried.seeds.get("expected")
    whole = [f"{pair}: all" for pair in tried.seeds.notes["pairs"]]
    seeds["jaccard"] = sum(together[name] for name in whole) / len(whole)
    shared = tried.seeds.get("intersection")
    seeds["times_chance"] = sum(shared[name] / expected[name] for name in whole) / len(whole)
    changed = run.settings.recipe != bc.SparsifyConfig()
    recipe = "another recipe" if changed else "the default recipe"
    return {"falsified_recipe": recipe, "falsified": rows, "seeds": seeds} | _at_equal_size(tried)


def _at_equal_size(tried: bc.Falsification) -> dict[str, Any]:
    """What trained and re-initialised weights reach with as many weights, and without a penalty."""
    if tried.curves is None or tried.gaps is None:
        return {}
    models = {"trained": TRAINED, "blocks": RANDOM_BLOCKS, "everything": RANDOM_MODEL}
    columns = {"kl": "kl", "r": "surprisal_correlation", "told": "context_told", "fraction": "fraction"}
    values = {word: tried.controls.get(key) for word, key in columns.items()}
    equal = {
        "sizes": list(tried.curves.points),
        "kl": {word: _known(tried.curves.get("kl", of)) for word, of in models.items()},
        "r": {word: _known(tried.curves.get("surprisal_correlation", of)) for word, of in models.items()},
    }
    keys = {"kl": "kl_gap", "r": "r_gap", "told": "context_told_gap"}
    gaps: dict[str, dict[str, Any]] = {
        word: {key: _gap(tried.gaps, name, of) for key, name in keys.items()}
        for word, of in {
            "blocks": RANDOM_BLOCKS, "everything": RANDOM_MODEL, "shuffled": SHUFFLED, "nonsense": NONSENSE
        }.items()
    }  # fmt: skip
    at_size = tried.gaps.get("kl_gap")
    over_seeds = [of for name, of in at_size.items() if name.startswith(f"{RANDOM_BLOCKS}, seed ")]
    over_seeds.append(at_size[RANDOM_BLOCKS])
    gaps["blocks"]["range"] = [min(over_seeds), max(over_seeds)]
    ceilings = {
        word: {key: of[free_name(name)] for key, of in values.items()}
        for word, name in models.items()
        if free_name(name) in tried.controls.names
    }
    at_least = tried.size_ratio[0] if tried.size_ratio else None
    return {"equal_size": equal, "gaps": gaps, "ceilings": ceilings, "size_ratio": at_least}


def outside(run: Run) -> dict[str, Any]:
    """The numbers of a run of a model that was not made here."""
    assert run.evaluation is not None
    rows = {
        name: {"r": row.surprisal_correlation, "kl": row.kl, "loss": row.mean_surprisal, "kept": row.kept,
               "fraction": row.fraction}
        for name, row in run.evaluation.rows()
    }  # fmt: skip
    return {"steps": len(run.history), **rows}


def _known(numbers: Any) -> list[float | None]:
    return [None if math.isnan(number) else float(number) for number in numbers]


def _gap(gaps: Any, quantity: str, name: str) -> dict[str, float]:
    at = gaps.quantities.index(gaps.quantity(quantity)), gaps.names.index(name)
    return {"gap": float(gaps.values[at]), "low": float(gaps.low[at]), "high": float(gaps.high[at])}


def _pattern(template: str) -> tuple[re.Pattern[str], list[str]]:
    """What a template matches in a page, whatever the numbers are, and the fields of its groups."""
    parts, fields = [], []
    for words, name, spec, _ in string.Formatter().parse(template):
        parts.append(re.sub(r"(?:\\ )+", r"\\s+", re.escape(words)))
        if name is not None:
            parts.append(f"({_WORDS if spec == 's' else _NUMBER})")
            fields.append(f"{{{name}:{spec}}}")
    if template.startswith("|"):  # a whole row of a table
        parts = ["^", *parts, "$"]
    return re.compile("".join(parts), re.MULTILINE), fields


def stated(page: str, text: str, numbers: dict[str, Any]) -> str:
    """The text of a page with these numbers in it.

    Raises:
        ValueError: If a template of the page is there not once.
    """
    for template in STATED[page]:
        pattern, fields = _pattern(template)
        matches = list(pattern.finditer(text))
        if len(matches) != 1:
            raise ValueError(f"{page} has {len(matches)} places like this one, not 1: {template}")
        for group in reversed(range(len(fields))):
            start, end = matches[0].span(group + 1)
            text = text[:start] + fields[group].format(**numbers) + text[end:]
    return text


def main() -> None:
    """Make or read the run, and write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished default run, instead of making one")
    parser.add_argument(
        "--outside", type=Path, nargs=2, metavar=("NORMAL", "THOROUGH"), help="two finished runs of another model"
    )
    parser.add_argument(
        "--check", action="store_true", help="run nothing, write nothing: compare pages with numbers.json"
    )
    arguments = parser.parse_args()
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    if not arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            run = (
                bc.load_run(arguments.run)
                if arguments.run
                else bc.study(falsify=True, out=Path(folder) / "run", tell=print)
            )
            numbers |= measured(run)
        if arguments.outside:
            efforts = zip(("normal", "thorough"), arguments.outside, strict=True)
            numbers["outside"] = {effort: outside(bc.load_run(folder)) for effort, folder in efforts}
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    for page in STATED:
        text = (ROOT / page).read_text()
        changed = stated(page, text, numbers)
        if changed != text:
            print(f"{page} {'states other numbers' if arguments.check else 'was changed'}")
            if arguments.check:
                raise SystemExit(1)
            (ROOT / page).write_text(changed)


if __name__ == "__main__":
    main()
