"""recipe/report.py: measures against numbers worked by hand, the tables, the page, the figure."""
import json
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipe import report
from recipe.report import Setting, forced_spans, measure, paired_gain, scaling, summarize, wilson


def a_row(**changes):
    return dict(found="1", correct=False, ended="natural", answered="natural",
                thinking_tokens=10) | changes


def a_run(tokens, accuracy, within_budget=True, n=1000, **changes):
    """(run, rows) with this mean of thinking tokens and this accuracy."""
    rows = [a_row(correct=i < round(n * accuracy), thinking_tokens=tokens) for i in range(n)]
    run = measure(rows, "m", Setting("budget", tokens), 0)
    return run | dict(within_budget=within_budget) | changes, rows


# ---- Measures -------------------------------------------------------------------------------


def test_measure():
    rows = [a_row(correct=i < 30, found=None if i > 37 else "5",
                  answered="cut" if i < 3 else "natural") for i in range(40)]
    run = measure(rows, "student", Setting("budget", 16), 3)
    low, high = wilson(30, 40)
    assert run == {
        "model": "student", "method": "budget", "max_thinking": 16, "min_thinking": 0,
        "num_waits": 0, "samples": 1, "seed": 3, "n": 40, "correct": 30, "accuracy": 0.75,
        "low": low, "high": high, "thinking_tokens": 10.0, "cut": 3, "unanswered": 2,
        "within_budget": True}


def test_wilson():
    low, high = wilson(30, 40)
    assert low == pytest.approx(0.5981, abs=1e-4) and high == pytest.approx(0.8581, abs=1e-4)
    assert wilson(0, 40)[0] == 0 and wilson(40, 40)[1] == 1


def test_paired_gain():
    rows, others = ([a_row(correct=i < n) for i in range(40)] for n in (30, 20))
    mean, low, high, p = paired_gain(rows, others)
    assert mean == 25 and low == pytest.approx(25 - 1.96 * 100 * (0.25 * 0.75 / 40) ** 0.5)
    assert mean - low == pytest.approx(high - mean)
    assert p == pytest.approx(2 / 2 ** 10)          # ten verdicts differ, and all of them are gains
    mixed = [a_row(correct=i in (0, 1, 2)) for i in range(8)]
    assert paired_gain(mixed, [a_row(correct=i == 7) for i in range(8)])[3] == pytest.approx(
        2 * (1 + 4) / 16)
    assert paired_gain(rows, rows)[3] == 1
    many = [a_row(correct=i < 100) for i in range(200)]             # more than 64 bits
    assert paired_gain(many, [a_row()] * 200)[3] == pytest.approx(2 / 2 ** 100)


def test_within_budget():
    assert Setting("tokens", 64).within_budget(64) and not Setting("tokens", 64).within_budget(64.1)
    long = Setting("class", min_thinking=100)
    assert long.within_budget(101) and not long.within_budget(100)
    assert Setting("budget").within_budget(5) is None
    assert Setting("direct", 0).within_budget(0) is None
    assert Setting("budget", 0).within_budget(0)


def test_summary():
    """Control, Scaling and Performance by hand: 20 points per doubling, then 10."""
    runs = [a_run(0, 0.1), a_run(16, 0.2), a_run(32, 0.4), a_run(64, 0.5)]
    found = summarize([*runs, a_run(99, 0.9, within_budget=None, num_waits=1)])
    assert found["control"] == 100 and found["performance"] == 90
    assert found["scaling_points_per_doubling"] == pytest.approx((20 + 15 + 10) / 3)
    low, high = found["scaling_points_per_doubling_interval"]
    assert 13 < low < 15 < high < 17
    per_token = (20 / 16 + 30 / 48 + 10 / 32) / 3
    assert found["scaling_points_per_1000_tokens"] == pytest.approx(1000 * per_token)
    assert summarize([*runs[1:], a_run(70, 0.5, within_budget=False)])["control"] == 75
    alone = summarize([a_run(5, 0.5, within_budget=None)])
    assert alone["control"] is None and alone["scaling_points_per_doubling"] is None


def test_scaling_is_per_doubling():
    """The paper's tables 12 to 14 print the Scaling of log2(tokens) (RECIPE, part 4). Runs that are
    too close do not count as a pair."""
    assert scaling([16, 32], [0.2, 0.4]) == pytest.approx(20)
    assert 19 < scaling([16, 32, 64, 64.05], [0.2, 0.4, 0.6, 0.594]) < 21
    assert scaling([0, 64], [0.1, 0.4]) is None


# ---- Several samples of a question ----------------------------------------------------------


def test_rejection_takes_the_first_natural_end():
    cut, right, other = a_row(ended="cut"), a_row(found="2", correct=True), a_row(found="3")
    assert report.rejection([cut, right, other]) == {**right, "tries": 2}
    none = report.rejection([cut, {**cut, "correct": True, "answered": "cut"}])
    assert (none["found"], none["correct"], none["tries"]) == (None, False, 2)
    assert none["answered"] == "none"                           # not a cut answer: none was taken


def test_majority_vote():
    def vote(*answers, equal=lambda a, b: a.strip() == b.strip()):
        samples = [a_row(found=answer, sample=i) for i, answer in enumerate(answers)]
        row = report.majority(samples, equal)
        assert row["thinking_tokens"] == 10 * len(answers)
        return row["found"], row["sample"]
    assert vote("3", "2", None, None, None, "2") == ("2", 1)
    assert vote("3", "2", "2", "3") == ("3", 0)                 # the earlier of equals
    assert vote(None, None) == (None, 0) and vote(None, "4") == ("4", 1)
    assert vote("0.5", "3", "1/2", "3", ".5", equal=lambda a, b: (a == "3") == (b == "3")) == (
        "0.5", 0)                                               # by value, not by spelling


def test_coverage_takes_a_correct_sample():
    wrong, right = a_row(found=None), a_row(found="2", correct=True)
    assert report.coverage([wrong, right, wrong]) == {**right, "thinking_tokens": 30}
    assert report.coverage([wrong, wrong]) == {**wrong, "thinking_tokens": 20}
    assert report.coverage([wrong, {**right, "correct": False}])["found"] == "2"


# ---- Tables and figure ----------------------------------------------------------------------


def test_table_row():
    run, _ = a_run(16, 0.25, n=500, cut=1, unanswered=500)
    row = report.table_row(run)
    assert row.split() == ["m", "16", "16.0", "25.0%", "[", "21.4,", "29.0]", "0.2%", "100.0%",
                           "█" * 6]
    assert report.header().split()[:3] == ["model", "thinking", "budget"]
    for name, share in (("cut", "0.2%"), ("none", "100.0%")):
        assert report.header().index(name) + len(name) == row.index(share) + len(share)
    del run["cut"]                              # as before this was counted
    assert report.table_row(run).split()[-3:] == ["-", "100.0%", "█" * 6]
    names = [report.setting_name(run | changes) for changes in (
        dict(method="direct"), dict(max_thinking=-1), dict(max_thinking=-1, num_waits=2),
        dict(method="class"), dict(method="class", max_thinking=-1), dict(method="tokens"),
        dict(method="majority", samples=4))]
    assert names == ["no thinking", "unlimited", "unlimited + 2 Wait", "class: short",
                     "class: long", "tokens: 16", "majority: of 4"]


def test_long_names_keep_the_columns(tmp_path, capsys):
    long = "experiments/first/student"
    report.redraw([a_run(16, 0.5, model=long)[0], a_run(16, 0.5)[0]], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index(" 16") for line in lines[1:3]}) == 1 and long in lines[1]


def test_finish_writes_the_measures_of_all_but_the_base(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    base = [a_run(0, 0.2, None, model="base", method="direct"),
            a_run(90, 0.0, None, model="base", max_thinking=-1)]
    models = [[a_run(16, a, model=name), a_run(60, b, None, model=name, max_thinking=-1),
               a_run(90, c, None, model=name, max_thinking=-1, num_waits=1)]
              for name, a, b, c in (("a", 0.1, 0.4, 0.5), ("b", 0.3, 0.6, 1.0))]
    results = [*base, *models[0], *models[1]]
    report.finish(results, tmp_path, ["strict"], "base")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["graders"] == ["strict"] and list(summary["models"]) == ["a", "b"]
    assert summary["models"]["b"]["budget"]["performance"] == 100
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert runs == [run | {"base": run["model"] == "base"} for run, _ in results]
    printed = capsys.readouterr().out
    assert "1 Wait over 0: +10.0 points" in printed and "1 Wait over 0: +40.0 points" in printed
    table = [line.split() for line in printed.splitlines()[-9:-2]]
    assert table[0] == ["thinking", "budget", "a", "b", "mean", "spread"]
    assert table[1] == ["16", "10.0%", "30.0%", "20.0%", "20.0"]
    # 30 points more at 60 than at 16 tokens are 15.7 per doubling, for both.
    assert table[4:] == [["budget:", "control", "100.0", "100.0", "100.0", "0.0"],
                         ["budget:", "per", "doubling", "15.7", "15.7", "15.7", "0.0"],
                         ["budget:", "best", "run", "50.0", "100.0", "75.0", "50.0"]]
    # Without matplotlib nothing but the figure is missing.
    assert "no curve.png: `pip install matplotlib`" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"runs.jsonl", "summary.json",
                                                          "report.html"}


@pytest.mark.parametrize("changes", [
    {"thinking_tokens": "x"}, {"accuracy": float("inf")}, {"model": None}, {"n": 0}])
def test_what_is_no_runs_file_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"not a runs\.jsonl"):
        report.redraw([a_run(4, 1.0)[0] | changes], tmp_path)
    with pytest.raises(ValueError, match=r"not a runs\.jsonl"):
        report.redraw([{"question": "q"}], tmp_path)


def test_the_figure_shows_every_model_and_method(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    axes, save = [], Figure.savefig
    limits = [a_run(16, 0.4)[0], a_run(32, 0.6)[0]]
    waits = [a_run(60, 0.9, num_waits=1)[0], a_run(70, 0.9, num_waits=2)[0]]
    free = [a_run(55, 0.8)[0], *waits]
    others = [run | {"model": "other"} for run in free]

    def savefig(figure, path, **options):
        axes.extend(figure.axes)
        save(figure, path, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        report.draw([a_run(0, 0.2, method="direct", base=True)[0],
                     a_run(900, 0, model="base", base=True)[0], *limits, *waits,
                     a_run(9, 0.3, model="other")[0], a_run(9, 0.3, method="tokens")[0]],
                    tmp_path / "curve.png")
        unlimited = [run | {"max_thinking": -1} for run in free + others]
        report.draw(unlimited, tmp_path / "waits.png")
    assert sorted(axes[0].get_legend_handles_labels()[1]) == ["m", "m, tokens", "other"]
    assert [text.get_text() for text in axes[0].texts] == ["m, no thinking", "1 Wait", "2 Waits"]
    assert axes[0].get_xlim()[1] < 100          # the base's thinking is left out
    assert axes[0].get_xlim()[0] == axes[0].get_ylim()[0] == 0
    assert (tmp_path / "curve.png").stat().st_size > 5000
    # Without limits on the thinking the axes zoom in, and the labels of two models would overlap.
    assert axes[1].get_xlim()[0] > 50 and axes[1].get_ylim()[0] > 50 and not axes[1].texts
    assert axes[0].get_legend() and not axes[0].figure.legends


def test_many_lines_are_named_beside_the_axes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: (
        figures.append(figure), save(figure, path, **options)))
    runs = [a_run(16, 0.4, model=str(i))[0] for i in range(27)]
    with warnings.catch_warnings():             # matplotlib warns where the axes have no room
        warnings.simplefilter("error")
        report.draw(runs, tmp_path / "curve.png")
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    assert len(legend.get_texts()) == 27
    assert legend.get_window_extent().x0 > axes.get_window_extent().x1
    lines = [container[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) > 20


# ---- The page -------------------------------------------------------------------------------


def test_forced_spans():
    def decode(tokens):
        return b"".join(tokens).decode(errors="replace")
    smile = "\N{SLIGHTLY SMILING FACE}".encode()
    tokens = [b"a", b"Wait", b"\n", b"b", smile[:2], smile[2:], b"answer", b"x\xff", b"end"]
    forced = [False, True, True, False, False, True, True, False, True]
    text = decode(tokens)
    spans = forced_spans(tokens, forced, decode)
    assert [text[start:end] for start, end in spans] == [
        "Wait\n", smile.decode() + "answer", "end"]
    assert forced_spans([], [], decode) == []
    assert forced_spans(tokens[:5], forced[:4] + [True], decode) == [[1, 6], [7, 8]]


class Scripts(HTMLParser):
    """The elements of a page, and the text of its scripts, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.scripts += [""] * (tag == "script")

    def handle_data(self, text):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += text


EVIL = """</script><script>alert(1)</script><!-- <script> ]]> {{page}} \u2028 \ud800 <img src=x>"""


def test_the_page_holds_all_answers_and_text_stays_text(tmp_path):
    rows = [a_row(question=EVIL, answer={EVIL: EVIL}, text=EVIL, found=EVIL, forced_spans=[[0, 3]])]
    run = measure(rows, EVIL, Setting("budget", num_waits=2), 0)
    report.write_page([(run, rows), (run, rows)], tmp_path / "report.html")
    template = Scripts(Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8"))
    page = Scripts((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.tags == template.tags and page.scripts[1] == template.scripts[1]
    data = json.loads(page.scripts[0])
    assert data == {"runs": [run | {"setting": "unlimited + 2 Wait"}] * 2, "rows": [rows] * 2}


def test_the_page_loads_nothing_and_parses_no_text_as_html():
    text = Path(report.__file__).with_suffix(".html").read_text(encoding="utf-8")
    names = {name for name, _ in Scripts(text).attributes}
    assert not names & {"src", "href", "srcset"}
    assert not re.search(r"url\(|@import|fetch\(|import\(|XMLHttp|WebSocket", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\.write\(|eval|srcdoc", text)
