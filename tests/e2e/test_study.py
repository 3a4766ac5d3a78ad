"""The study runs, goes on where it was, gives the same again, and says what its results say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

STUDY = Path(__file__).parents[2] / "benchmarks" / "quality"
ONLY = "final payments [bo]*"
"""Without training and with it: base, base-shown and ours, and what their rates need."""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def but_time(line):
    return {key: value for key, value in line.items() if key != "seconds"}


@pytest.fixture
def load(monkeypatch):
    """Import a module of the study, which runs as scripts and is no package."""
    monkeypatch.syspath_prepend(str(STUDY))
    known = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    # What they import of each other has names that other tests may use.
    for name in set(sys.modules) - known:
        if (STUDY / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def quick(load, capsys):
    """Do what a command line says, in this process; return the status, and what was printed."""
    threads = torch.get_num_threads()
    is_strict = torch.are_deterministic_algorithms_enabled()
    study = load("study")

    def quick(path, *arguments):
        options = ("--quick", "--processes", "1", "--results", str(path))
        status = study.main([*arguments, *options])
        return status, *capsys.readouterr()

    yield quick
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(is_strict)


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_gives_the_same_again(quick, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert 0 == quick(whole, "run", "--only", ONLY)[0]
    written = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(written[:-3]))

    status, printed, _ = quick(cut, "run", "--only", ONLY)

    assert 0 == status
    assert ["1/3", "2/3", "3/3"] == [line.split()[0] for line in printed.splitlines()]
    assert list(map(but_time, lines(whole))) == list(map(but_time, lines(cut)))
    runs = [result["run"] for result in lines(whole)]
    assert 2 == sum(run["stage"] == "search" for run in runs)
    assert {"base", "base-shown", "ours"} == {
        run["method"] for run in runs if run["stage"] == "final"
    }
    # Nothing is left.
    assert (0, "") == quick(cut, "run", "--only", ONLY)[:2]

    status, printed, _ = quick(cut, "report")

    assert 0 == status
    assert printed.strip() == cut.with_suffix(".md").read_text().strip()
    assert "| ours | 2,420 |" in printed
    assert cut.with_suffix(".svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_results_of_another_setup_are_not_mixed(quick, tmp_path):
    path = tmp_path / "results.jsonl"
    only = ("run", "--only", "final payments base")
    assert 0 == quick(path, *only)[0]
    path.write_text(path.read_text().replace('"torch": "', '"torch": "1'))
    before = path.read_text()

    status, _, error = quick(path, *only)

    assert 1 == status
    assert (
        f"{path} has results of another setup (torch): run all again into another file.\n" == error
    )
    assert before == path.read_text()


@pytest.mark.slow
def test_a_report_of_nothing_is_refused(quick, tmp_path):
    path = tmp_path / "results.jsonl"

    assert (1, "", f"{path} has no results: `run` first.\n") == quick(path, "report")


@pytest.mark.slow
def test_a_glob_that_matches_nothing_is_refused():
    found = subprocess.run(  # noqa: S603 (our own script)
        [sys.executable, STUDY / "study.py", "list", "--only", "nothing*"],
        capture_output=True,
        text=True,
        check=False,
        env={"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )

    assert 1 == found.returncode
    assert found.stderr.splitlines()[-1] == (
        "--only 'nothing*' matches no run; `list` prints their names."
    )


def test_splits_have_nothing_in_common(load):
    tasks = load("tasks")
    for task in tasks.TASKS:
        splits = [tasks.examples(task, split) for split in tasks.SIZES]
        assert [*tasks.SIZES.values()] == [len(split) for split in splits]
        # Dates and names as a whole; of payments, the ledger's "Lopez, W.".
        answers = [{e.target.split(":")[0] for e in split} for split in splits]
        assert answers[0].isdisjoint(answers[2])
        assert answers[1].isdisjoint(answers[2])
        sources = [{e.source for e in split} for split in splits]
        assert sources[0].isdisjoint(sources[2])
        assert sources[1].isdisjoint(sources[2])


@pytest.mark.parametrize(
    ("day", "expected"),
    [
        *[(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th")],
        *[(21, "21st"), (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")],
    ],
)
def test_ordinals(load, day, expected):
    assert expected == load("tasks")._ordinal(day)


class Recaller(torch.nn.Module):
    """A model of bytes that expects each byte to be followed by what `after` says."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):  # noqa: ARG002
        following = torch.tensor(
            [[self.after.get(i, 0) for i in row] for row in input_ids.tolist()]
        )
        logits = 10.0 * torch.nn.functional.one_hot(following, 128).float()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_exact_match_counts_answers_with_every_token_right(load):
    training = load("training")
    tasks = sys.modules["tasks"]
    examples = [tasks.Example(source=s, target=t) for s, t in (("a", "xy"), ("bb", "xz"))]
    # After the arrow: " xy\n".
    after = dict(zip(b"> xy", b" xy\n", strict=True))

    found = training.score(Recaller(after), lambda text: list(text.encode()), examples)

    assert 1 == found.exact
    # Of eight tokens two are unexpected: z after x, and the end after z.
    right = torch.logsumexp(torch.tensor([10.0] + [0.0] * 127), 0)
    assert found.loss == pytest.approx(((6 * (right - 10) + 2 * right) / 8).item())


def test_exact_match_is_what_greedy_decoding_gives(load):
    """One pass over the right answer and decoding token by token agree, padding included."""
    bases, training = load("bases"), load("training")
    tasks = sys.modules["tasks"]
    base = bases.load(is_quick=True)
    with torch.no_grad():
        # Steeper, so that what is decoded depends on the source.
        for parameter in base.model.parameters():
            parameter.mul_(8)
    sources = ["7 May", "the 12th of June", "x"]
    replies = []
    for source in sources:
        prompt = torch.tensor([base.encode(f"{source}{training.ARROW} ")])
        tokens = base.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        replies.append(tokens[0, prompt.shape[1] :].tolist())
    assert len(set(map(tuple, replies))) > 1
    # The arrow's space is given, so only what follows it is compared.
    batch = training.batch_of(base.encode, [tasks.Example(source=s, target="abc") for s in sources])
    for row, reply in enumerate(replies):
        batch.inputs["input_ids"][row, -4:-1] = torch.tensor(reply)
    with torch.inference_mode():
        found = training.target_logits(base.model, batch).argmax(dim=-1)

    assert replies == found[:, 1:4].tolist()


def test_better_means_beyond_the_spread(load):
    report = load("report")

    def verdict(mine, theirs, sign):
        spreads = (report.Spread(values, ".1f") for values in (mine, theirs))
        return report._verdict(*spreads, "ours", "peft-lora", sign=sign)

    assert verdict((5.0, 6.0), (3.0, 4.0), 1) == "+2.0 points: ours is better"
    assert verdict((5.0, 6.0), (3.0, 4.0), -1) == "+2.0 nats: PEFT LoRA is better"
    assert verdict((4.0, 6.0), (3.0, 4.0), 1) == "+1.5 points: within the spread"
    assert verdict((1.0, 2.0), (3.0, 4.0), 1) == "-2.0 points: PEFT LoRA is better"


def test_the_rate_with_the_lowest_validation_loss_is_chosen(load):
    runs = load("runs")

    def result(rate, loss, method="ours"):
        run = runs.Run(stage="search", task="dates", method=method, rate=rate, seed=0)
        return runs.Result(
            run=run, exact=0, num_examples=1, loss=loss, parameters=1, losses=(), seconds=1.0,
            setup={},
        )  # fmt: skip

    rates = runs.FULL.rates
    tried = [result(rate, loss) for rate, loss in zip(rates, (0.5, 0.2, float("nan")), strict=True)]

    assert {("dates", "ours"): rates[1]} == runs.chosen_rates(tried, runs.FULL)
    # Not before all were tried.
    assert {} == runs.chosen_rates(tried[:-1], runs.FULL)
