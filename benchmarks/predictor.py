"""Length predictors on real completions: the trained one on ShareGPT, the learning one on other models' lengths.

    python benchmarks/predictor.py DATA_FOLDER --model MODEL_DIR [--own OUTPUT_FOLDER [--own-past OUTPUT_FOLDER]]

DATA_FOLDER holds `prompts/sharegpt_prompts.jsonl.xz` (first turns of ShareGPT V3: prompt, out_tok, split) and, in
`traces/`, `predictor_errors_vicuna13b_85k.csv.xz` (James-QiuHaoran/LLM-serving-with-proxy-models: length, and the class
that a BERT said), `lengths_seqsched_alpaca20k.csv.xz` (zhengzangw/Sequence-Scheduling), and
`trace_etalon_sharegpt8k.csv.xz`, `trace_etalon_bwb.csv.xz` (project-etalon/etalon: prompt and completion tokens).

Trained on split `train` (curves measured by cross-fitting on it), tested on split `bench`, lengths cut at MAX_TOKENS.
`group_sum_error` is the mean of |predicted sum / real sum - 1| over 4,000 random groups of 256 different test rows;
`unbiased_group_sum_error` is the same after scaling the predictions to the right sum of all test rows: what is left is
chance. `smallest_fresh_group_sum_error` is chance for groups of fresh rows, not of the test's few: the mean absolute
value of a normal error with the residuals' deviation. `interval` is how far sums may be off as a plan says it, and
`covered` the share of sums that are not farther off. --own is what batchpipe made of prompts of split `bench`: the
predictor of the recorded answers learns this model's lengths from its own rows; --own-past is the same of split
`train`: a predictor is trained on it instead. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import lzma
import tempfile
import time
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path

import numpy as np

from batchpipe.commands.plan_lengths import INTERVAL_ERRORS
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import load_tokenizer
from batchpipe.predict.base import Classifier, Survival
from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.quantile import QuantileClassifier
from batchpipe.training.evaluate import GROUP_ROWS, evaluate, group_sum_error
from batchpipe.training.examples import Examples, read_examples
from batchpipe.training.train import train
from batchpipe.types import BoolArray, Int32Array

MAX_TOKENS = 1024
SEED = 0
LEARNING_SHARES = (0.25, 0.5)
NUM_FINISHED = 512
OWN_NUM_FINISHED = (128, 256, 512)
NUM_SLOTS = 128
NUM_FOLLOWING = 4096
NUM_ORDERS = 40
NUM_GROUPS_COVERED = 400
NUM_RUNNING_TIMED = 1000
# Where a trace comes with one of five quantiles of length instead of a prompt, the trained class that stands for it.
CLASS_OF_QUANTILE = np.array([1, 3, 5, 7, 7], np.int32)
NONE = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Rows:
    """Rows of a trace: classes, tokens, and whether they ended by themselves."""

    classes: Int32Array
    num_tokens: Int32Array
    ended: BoolArray
    max_tokens: int


def read_splits(path: Path, model: Path) -> dict[str, Examples]:
    tokenizer = load_tokenizer(model)
    lines: dict[str, list[str]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            lines.setdefault(json.loads(line)["split"], []).append(line)
    with tempfile.TemporaryDirectory() as folder:
        splits = {}
        for split, rows in lines.items():
            plain = Path(folder) / f"{split}.jsonl"
            plain.write_text("".join(rows), encoding="utf-8")
            splits[split] = read_examples([plain], tokenizer, InputSpec(path=(str(plain),)))
    return splits


def read_output(folder: Path, model: Path) -> Examples:
    """Of one job, whose prompts are in the column that jobs have them in by default."""
    return read_examples([folder], load_tokenizer(model), InputSpec(path=(str(folder),)))


def read_columns(path: Path) -> dict[str, np.ndarray]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def learnt(rows: Rows, classifier: Classifier, draw: np.random.Generator, num_finished: int) -> dict[str, float]:
    """|predicted / real - 1| of the sum of up to NUM_FOLLOWING rows not begun when `num_finished` rows are done.

    NUM_SLOTS rows run side by side, a token a step; where one ends the next begins. `finished_alone` is the forecast
    that takes the mean of what is finished for the mean of all, `prior` the one made before the job.
    """
    order = draw.permutation(len(rows.num_tokens))
    tokens, classes, ended = rows.num_tokens[order], rows.classes[order], rows.ended[order]
    slots = [(int(tokens[row]), row) for row in range(NUM_SLOTS)]
    heapq.heapify(slots)
    finished: list[int] = []
    for following in range(NUM_SLOTS, NUM_SLOTS + num_finished):
        now, row = heapq.heappop(slots)
        finished.append(row)
        heapq.heappush(slots, (now + int(tokens[following]), following))
    running = np.array([row for _, row in slots])
    so_far = np.array([int(tokens[row]) - (end - now) for end, row in slots], np.int32)

    predictor = OnlinePredictor(classifier, rows.max_tokens)
    rest = np.arange(NUM_SLOTS + num_finished, min(len(tokens), NUM_SLOTS + num_finished + NUM_FOLLOWING))
    limits = np.full(len(rest), rows.max_tokens, np.int32)
    real = tokens[rest].sum()
    before = predictor.survival(NONE, NONE)
    predictor.observe(classes[finished], tokens[finished], ended[finished])
    after = predictor.survival(classes[running], so_far)
    found = {"finished_alone": abs(tokens[finished].mean() * len(rest) / real - 1)}
    for name, survival in (("prior", before), ("learnt", after)):
        off, interval = off_and_interval(survival, classes[rest], limits, real)
        found |= {name: abs(exp(off) - 1), f"{name}_interval": interval, f"{name}_covered": float(abs(off) < interval)}
    return found


def off_and_interval(survival: Survival, classes: Int32Array, limits: Int32Array, real: float) -> tuple[float, float]:
    """Logarithms: of the predicted sum over the real one, and of the interval's upper end over the predicted sum."""
    off = float(np.log(survival.expected_tokens(classes, limits).sum() / real))
    return off, INTERVAL_ERRORS * survival.sum_error(classes, limits)


def mean_learnt(rows: Rows, classifier: Classifier, num_finished: int = NUM_FINISHED) -> dict[str, float]:
    """Over NUM_ORDERS orders of the rows; `learnt_worst` is the worst of them."""
    draw = np.random.default_rng(SEED)
    found = [learnt(rows, classifier, draw, num_finished) for _ in range(NUM_ORDERS)]
    means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    return means | {"learnt_worst": max(one["learnt"] for one in found)}


def covered_groups(classifier: Classifier, test: Examples, max_tokens: int) -> dict[str, float]:
    """Of random groups of GROUP_ROWS test rows, each as a job of its own that nothing is known of yet."""
    draw = np.random.default_rng(SEED)
    classes, real = classifier.classify(test.prompts), np.minimum(test.num_tokens, max_tokens)
    survival = OnlinePredictor(classifier, max_tokens).survival(NONE, NONE)
    limits = np.full(GROUP_ROWS, max_tokens, np.int32)
    groups = [draw.choice(len(real), GROUP_ROWS, replace=False) for _ in range(NUM_GROUPS_COVERED)]
    found = np.array([off_and_interval(survival, classes[group], limits, real[group].sum()) for group in groups])
    return {"interval": float(found[:, 1].mean()), "covered": float((np.abs(found[:, 0]) < found[:, 1]).mean())}


def of_own_rows(test: Examples, classifiers: dict[str, Classifier]) -> dict[str, object]:
    """What classifiers that know other answers say of one model's own, before its job and in it."""
    max_tokens = int(test.num_tokens.max())
    report: dict[str, object] = {"rows": len(test), "cut": int((~test.ended).sum()), "max_tokens": max_tokens}
    for name, classifier in classifiers.items():
        rows = Rows(classifier.classify(test.prompts), test.num_tokens, test.ended, max_tokens)
        report[name] = {num: mean_learnt(rows, classifier, num) for num in OWN_NUM_FINISHED}
        print("own", name, report[name], flush=True)
    return report


def traces(folder: Path, edges_tokens: Int32Array) -> dict[str, tuple[Rows, str]]:
    """Rows with a class, and which classifier the classes are of."""
    vicuna = read_columns(folder / "predictor_errors_vicuna13b_85k.csv.xz")
    alpaca = read_columns(folder / "lengths_seqsched_alpaca20k.csv.xz")
    found = {}
    tokens = vicuna["out_tok"].astype(np.int32)
    classes = CLASS_OF_QUANTILE[vicuna["pred_class5"].astype(np.int32)]
    found["vicuna_bert_classes"] = Rows(classes, tokens, np.ones(len(tokens), np.bool_), 512), "trained"
    tokens = alpaca["L_t0.7"].astype(np.int32)
    by_reference = CLASS_OF_QUANTILE[np.searchsorted(edges_tokens, alpaca["L_gt"].astype(np.int32))]
    ended = tokens < 512
    found["alpaca_classes_of_reference_answer"] = Rows(by_reference, tokens, ended, 512), "trained"
    one_class = np.full(len(tokens), CLASS_OF_QUANTILE[2], np.int32)
    found["alpaca_all_in_one_class"] = Rows(one_class, tokens, ended, 512), "trained"
    for name in ("etalon_sharegpt8k", "etalon_bwb"):
        columns = read_columns(folder / f"trace_{name}.csv.xz")
        tokens = columns["out_tok"].astype(np.int32)
        prompts = [np.zeros(length, np.int32) for length in columns["in_tok"].astype(int)]
        classes = QuantileClassifier.shipped().classify(prompts)
        found[name] = Rows(classes, np.minimum(tokens, 2048), tokens <= 2048, 2048), "quantile"
    return found


def survival_microseconds(classifier: Classifier) -> float:
    """The median of 200 calls with NUM_RUNNING_TIMED running rows, after as many finished ones."""
    draw = np.random.default_rng(SEED)
    classes = draw.integers(0, classifier.prior.num_classes, NUM_RUNNING_TIMED).astype(np.int32)
    tokens = draw.integers(1, 1024, NUM_RUNNING_TIMED).astype(np.int32)
    predictor = OnlinePredictor(classifier, 4096)
    predictor.observe(classes, tokens, np.ones(len(classes), np.bool_))
    seconds = []
    for _ in range(200):
        started = time.perf_counter()
        predictor.survival(classes, tokens)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="A folder with the tokenizer.")
    parser.add_argument("--own", type=Path, help="A folder of batchpipe's output.")
    parser.add_argument("--own-past", type=Path, help="Another, of other prompts.")
    arguments = parser.parse_args()
    splits = read_splits(arguments.data_folder / "prompts" / "sharegpt_prompts.jsonl.xz", arguments.model)
    test = splits["bench"]
    real = np.minimum(test.num_tokens, MAX_TOKENS).astype(np.float64)

    report: dict[str, object] = {}
    whole, val = splits["train"], splits["val"]
    shuffled = np.random.default_rng(SEED).permutation(len(whole))
    parts = {f"{share:.0%}_of_train": whole.take(shuffled[: int(share * len(whole))]) for share in LEARNING_SHARES}
    both = Examples(
        whole.prompts + val.prompts,
        np.concatenate([whole.num_tokens, val.num_tokens]),
        np.concatenate([whole.ended, val.ended]),
    )
    for name, examples in {**parts, "train_and_val": both, "train": whole}.items():
        started = time.perf_counter()
        classifier = train(examples, seed=SEED)
        seconds = time.perf_counter() - started
        result = asdict(evaluate(classifier, test, max_tokens=MAX_TOKENS, seed=SEED))
        classes = classifier.classify(test.prompts)
        predicted = classifier.prior.expected_tokens(classes, np.full(len(classes), MAX_TOKENS, np.int32))
        deviation = (real - predicted).std() / real.mean() / np.sqrt(GROUP_ROWS)
        result["smallest_fresh_group_sum_error"] = float(deviation * np.sqrt(2 / np.pi))
        result["train_seconds"] = round(seconds, 1)
        result["groups"] = covered_groups(classifier, test, MAX_TOKENS)
        report[f"trained_on_{name}"] = result
        print(name, len(examples), result, flush=True)
    mean = np.full(len(real), np.minimum(splits["train"].num_tokens, MAX_TOKENS).mean())
    report["mean_of_train_group_sum_error"] = group_sum_error(mean, real, seed=SEED)

    classifiers: dict[str, Classifier] = {"trained": classifier, "quantile": QuantileClassifier.shipped()}
    for name, (rows, kind) in traces(arguments.data_folder / "traces", classifier.edges_tokens).items():
        report[name] = mean_learnt(rows, classifiers[kind])
        print(name, report[name], flush=True)
    if arguments.own is not None:
        own = dict(classifiers)
        if arguments.own_past is not None:
            own["trained_on_own_past"] = train(read_output(arguments.own_past, arguments.model), seed=SEED)
        report["own_rows"] = of_own_rows(read_output(arguments.own, arguments.model), own)
    report["survival_microseconds"] = {kind: survival_microseconds(one) for kind, one in classifiers.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
