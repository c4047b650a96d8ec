"""A predictor of past outputs: what it learns, what its file keeps, which files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from batchpipe.errors import InputError, JobError, OutputError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.predict import open as opening
from batchpipe.predict.features import END_TOKENS, presence
from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.open import open_predictor
from batchpipe.predict.trained_file import load_classifier, save_classifier, tokenizer_fingerprint
from batchpipe.training.evaluate import GROUP_ROWS, evaluate, group_sum_error
from batchpipe.training.examples import Examples, read_examples
from batchpipe.training.train import train
from tests.tiny_tokenizer import build_tiny_tokenizer

NUM_TOKEN_IDS = 300
# A word that asks for a length, and the mean it then has.
SHORT, LONG = (7, 9), (8, 9)
MEANS = {SHORT: 20.0, LONG: 200.0}
PROMPTS = InputSpec(path=("past",))


def examples_of(num_rows: int, seed: int, cut_tokens: int | None = None) -> Examples:
    """Prompts of random tokens with one word that says how long the completion will be, more or less."""
    draw = np.random.default_rng(seed)
    words = [SHORT if short else LONG for short in draw.random(num_rows) < 0.5]
    prompts = [
        np.concatenate([draw.integers(20, NUM_TOKEN_IDS, 12), word, draw.integers(20, NUM_TOKEN_IDS, 5)]).astype(
            np.int32
        )
        for word in words
    ]
    tokens = np.ceil(draw.gamma(4, np.array([MEANS[word] for word in words]) / 4)).astype(np.int32)
    limit = 10_000 if cut_tokens is None else cut_tokens
    return Examples(prompts, np.minimum(tokens, limit), tokens <= limit)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def predictor_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor") / "trained.safetensors"
    save_classifier(path, train(examples_of(600, seed=1), seed=0), tokenizer_fingerprint(tokenizer))
    return path


def test_features_of_a_prompt() -> None:
    rows, features = presence([np.array([5, 6, 5, 6], np.int32), np.array([5], np.int32)])
    # the first: its length, the pairs (5, 6) and (6, 5), the tokens 5 and 6; the second: its length, the token 5
    assert rows.tolist() == [0] * 5 + [1] * 2
    assert features[rows == 1][1] in features[rows == 0]
    assert features[rows == 1][0] not in features[rows == 0]
    assert presence([])[0].tolist() == []
    ends = np.arange(1000, 1000 + END_TOKENS)
    one, other = (np.concatenate([ends, np.full(50, middle), ends + END_TOKENS]).astype(np.int32) for middle in (1, 2))
    np.testing.assert_array_equal(presence([one])[1], presence([other])[1])


def test_a_trained_classifier_is_right_on_sums_and_better_than_chance() -> None:
    classifier = train(examples_of(2000, seed=1), seed=0)
    assert len(classifier.edges_tokens) == 4
    test = examples_of(2000, seed=2)
    result = evaluate(classifier, test, max_tokens=2000, seed=0)
    assert result.accuracy is not None and result.accuracy > 0.4
    assert abs(result.bias) < 0.04
    assert result.group_sum_error is not None and result.unbiased_group_sum_error is not None
    assert result.unbiased_group_sum_error <= result.group_sum_error < 0.05
    # The mean alone, unbiased too, is worse.
    mean = np.full(len(test), test.num_tokens.mean())
    assert result.mean_absolute_error_tokens < 0.7 * np.abs(mean - test.num_tokens).mean()
    assert result.group_sum_error < group_sum_error(mean, test.num_tokens.astype(np.float64), seed=0)


def test_no_groups_where_rows_are_fewer_than_one() -> None:
    classifier = train(examples_of(200, seed=1), seed=0)
    result = evaluate(classifier, examples_of(GROUP_ROWS - 1, seed=2), max_tokens=2000, seed=0)
    assert result.group_sum_error is None and result.unbiased_group_sum_error is None


def test_rows_that_were_cut_do_not_make_the_curves_shorter() -> None:
    whole, cut = examples_of(2000, seed=3), examples_of(2000, seed=3, cut_tokens=180)
    assert 0.2 < (~cut.ended).mean() < 0.35
    classifier = train(cut, seed=0)
    assert (classifier.prior.alive[:, -1] == 0).all()
    classes = classifier.classify(whole.prompts)
    predicted = classifier.prior.expected_tokens(classes, np.full(len(whole), 180, np.int32))
    assert predicted.sum() == pytest.approx(np.minimum(whole.num_tokens, 180).sum(), rel=0.03)


def test_a_file_keeps_the_classifier(predictor_file: Path, tokenizer: Tokenizer) -> None:
    trained = train(examples_of(600, seed=1), seed=0)
    loaded = load_classifier(predictor_file, tokenizer_fingerprint(tokenizer))
    prompts = examples_of(50, seed=9).prompts
    np.testing.assert_array_equal(loaded.model.scores(prompts), trained.model.scores(prompts))
    np.testing.assert_array_equal(loaded.prior.alive, trained.prior.alive)
    np.testing.assert_array_equal(loaded.bounds, trained.bounds)
    np.testing.assert_array_equal(loaded.edges_tokens, trained.edges_tokens)


def test_an_unknown_prompt_has_a_class(predictor_file: Path, tokenizer: Tokenizer) -> None:
    loaded = load_classifier(predictor_file, tokenizer_fingerprint(tokenizer))
    classes = loaded.classify([np.array([1_000_000], np.int32), np.zeros(5000, np.int32)])
    assert all(0 <= value < loaded.prior.num_classes for value in classes)
    assert loaded.classify([]).tolist() == []


def test_a_file_of_another_tokenizer_is_refused(predictor_file: Path) -> None:
    with pytest.raises(JobError, match=r"predict\.method.*trained\.safetensors.*another tokenizer"):
        load_classifier(predictor_file, "0" * 64)


def test_the_fingerprint_is_the_vocabularys(tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(build_tiny_tokenizer(tmp_path, chat_template=None))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    again._backend.add_tokens(["<|new|>"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)


def test_a_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="predict.method: .*none.safetensors cannot be read"):
        load_classifier(tmp_path / "none.safetensors", "")
    foreign = tmp_path / "foreign"
    for content in (b"", b"text", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x02" + b"\0" * 7 + b"[}"):
        foreign.write_bytes(content)
        with pytest.raises(JobError, match="foreign is not a trained predictor"):
            load_classifier(foreign, "")
    save_file({"x": np.zeros(3)}, foreign)
    with pytest.raises(JobError, match="foreign is not a trained predictor"):
        load_classifier(foreign, "")


def changed(path: Path, predictor_file: Path, tokenizer: Tokenizer, **arrays: np.ndarray) -> Path:
    metadata = {"format": "batchpipe-length-predictor 1.1", "tokenizer": tokenizer_fingerprint(tokenizer)}
    save_file({**load_file(predictor_file), **arrays}, path, metadata)
    return path


def test_a_damaged_file_is_refused(predictor_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    fingerprint, path = tokenizer_fingerprint(tokenizer), tmp_path / "damaged"
    path.write_bytes(predictor_file.read_bytes()[:-100])
    with pytest.raises(JobError, match=r"predict\.method: .*damaged is damaged"):
        load_classifier(path, fingerprint)
    good = load_file(predictor_file)
    for name, wrong in {
        "weights": good["weights"][:-1],
        "rarity": np.full_like(good["rarity"], np.nan),
        "bounds": good["bounds"][:-1],
        "alive": good["alive"][:, ::-1].copy(),
        "features": good["features"][::-1].copy(),
        "grid_tokens": good["grid_tokens"].astype(np.int64),
        "another": np.zeros(1),
    }.items():
        with pytest.raises(JobError, match=r"predict\.method: .*damaged is damaged"):
            load_classifier(changed(path, predictor_file, tokenizer, **{name: wrong}), fingerprint)
    load_classifier(changed(path, predictor_file, tokenizer), fingerprint)


def test_a_file_of_another_version_is_refused(predictor_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "newer"
    save_file(load_file(predictor_file), path, {"format": "batchpipe-length-predictor 2.1", "tokenizer": ""})
    with pytest.raises(JobError, match="newer has the format 'batchpipe-length-predictor 2.1'.*train it again"):
        load_classifier(path, "")


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        save_classifier(tmp_path / "missing" / "file", train(examples_of(200, seed=1), seed=0), "")


def test_too_little_to_learn_from_is_an_error() -> None:
    with pytest.raises(InputError, match="99 completions are too few"):
        train(examples_of(99, seed=1), seed=0)
    same = examples_of(200, seed=1)
    one_length = np.full(200, 5, np.int32)
    for ended in (np.ones(200, np.bool_), np.zeros(200, np.bool_)):
        with pytest.raises(InputError, match="nearly all of one length"):
            train(Examples(same.prompts, one_length, ended), seed=0)
    with pytest.raises(InputError, match="nothing in common"):
        train(Examples([same.prompts[0]] * 200, same.num_tokens, same.ended), seed=0)


def test_examples_of_a_jsonl_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "past.jsonl"
    rows = [{"prompt": "the dog", "out_tok": 4}, {"prompt": "", "out_tok": 4}, {"prompt": "fox", "out_tok": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    examples = read_examples([path], tokenizer, PROMPTS)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the dog"}])
    assert [prompt.tolist() for prompt in examples.prompts] == tokenizer.encode_batch([text], add_special_tokens=False)
    assert examples.num_tokens.tolist() == [4] and examples.ended.tolist() == [True]
    with pytest.raises(InputError, match="'length'"):
        read_examples([path], tokenizer, PROMPTS, length_column="length")
    with pytest.raises(InputError, match="'question'"):
        read_examples([path], tokenizer, InputSpec(path=("past",), prompt_column="question"))


def test_examples_of_output_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "completions").mkdir(parents=True)
        table = pa.table(
            {
                "row_id": ["a", "b", "c"],
                "status": ["succeeded", "succeeded", "failed"],
                "finish_reason": ["stop", "length", None],
                "completion_tokens": pa.array([3, 16, None], pa.int32()),
                "prompt": ["the quick", "brown fox", "jumps"],
            }
        )
        pq.write_table(table, tmp_path / folder / "completions" / "part-00000.parquet")
    examples = read_examples([tmp_path / "one", tmp_path / "two"], tokenizer, PROMPTS)
    assert examples.num_tokens.tolist() == [3, 16] * 2
    assert examples.ended.tolist() == [True, False] * 2


def test_messages_are_the_same_as_values_and_as_json_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "dog"}, {"role": "user", "content": "fox"}]
    columns = {"talk": [messages, messages], "completion_tokens": [3, 4]}
    pq.write_table(pa.table(columns), tmp_path / "values.parquet")
    columns["talk"] = [json.dumps(messages), "not of messages"]
    pq.write_table(pa.table(columns), tmp_path / "text.parquet")
    spec = InputSpec(path=("past",), messages_column="talk")
    values, text = (read_examples([tmp_path / f"{name}.parquet"], tokenizer, spec) for name in ("values", "text"))
    assert [prompt.tolist() for prompt in values.prompts] == [prompt.tolist() for prompt in text.prompts * 2]
    assert values.num_tokens.tolist() == [3, 4] and text.num_tokens.tolist() == [3]


def test_no_row_with_a_length_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "past.jsonl"
    path.write_text('{"prompt": "fox", "completion_tokens": null}\n')
    with pytest.raises(InputError, match="no row has both"):
        read_examples([path], tokenizer, PROMPTS)


def test_every_method_opens_what_it_says(
    predictor_file: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_predictor("none", tokenizer, 512) is None
    prompts = examples_of(20, seed=4).prompts
    none = np.zeros(0, np.int32)
    for method, num_classes in (("auto", 8), ("quantile", 8), (str(predictor_file), 8)):
        predictor = open_predictor(method, tokenizer, 512)
        assert isinstance(predictor, OnlinePredictor)
        survival = predictor.survival(none, none)
        assert survival.num_classes == num_classes and survival.grid_tokens[-1] == 512
        assert predictor.classify(prompts).max() < num_classes
    with pytest.raises(JobError, match="batchpipe predictor train"):
        open_predictor("classifier", tokenizer, 512)
    monkeypatch.setattr(opening, "shipped_folder", lambda kind: tmp_path)
    (tmp_path / f"{tokenizer_fingerprint(tokenizer)[:16]}.safetensors").write_bytes(predictor_file.read_bytes())
    assert isinstance(open_predictor("classifier", tokenizer, 512), OnlinePredictor)
