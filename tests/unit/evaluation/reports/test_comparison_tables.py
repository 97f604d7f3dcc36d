"""Published results, and measured ones beside them."""

import pytest

from coprs_deploy.evaluation.reports.comparison_tables import (
    TABLES,
    comparison_json,
    comparison_lines,
    split_name,
)
from coprs_deploy.evaluation.reports.published import REASONING_RESULTS, REFERRING_RESULTS, SOURCES
from coprs_deploy.evaluation.summary import EvaluationSummary, Metric


def summary(num_rows, **metrics):
    metrics = {name: Metric(value) for name, value in metrics.items()}
    return EvaluationSummary("lisa", num_rows, 1, 0, metrics, {})


def test_published_results_of_coprs_are_those_of_the_paper():
    found = {r.method: r.values for r in REFERRING_RESULTS}
    assert found["CoPRS-3B"] == (80.4, 83.9, 75.6, 71.8, 78.9, 66.5, 74.8, 73.7)
    assert found["CoPRS-7B"] == (81.6, 85.3, 79.5, 75.9, 80.3, 69.7, 76.2, 76.2)
    found = {r.method: r.values for r in REASONING_RESULTS}
    assert found["CoPRS-3B"] == (61.3, 60.6, 57.8, 52.7)
    assert found["CoPRS-7B"] == (65.2, 64.5, 59.8, 55.1)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_published_results_have_a_source_and_possible_values(table):
    methods = [result.method for result in table.results]
    assert len(methods) == len(set(methods)) > 20
    for result in table.results:
        assert result.source in SOURCES
        assert any(value is not None for value in result.values)
        assert all(value is None or 10 < value < 100 for value in result.values)


def test_comparison_lines_put_measured_values_into_their_columns():
    found = {"refcoco:unc:testA": summary(5_657, ciou=0.8125), "x.jsonl": summary(3, ciou=1.0)}
    lines = comparison_lines(found)
    row = next(line for line in lines if "this evaluation" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["**this evaluation**", "-", "**81.2**", *["-"] * 6, ""]
    assert "not the whole split" not in "\n".join(lines)
    assert "protocol lisa" in "\n".join(lines)
    assert any("None of its splits was evaluated: reasonseg:val" in line for line in lines)


def test_comparison_lines_mark_a_part_of_a_split():
    found = {"reasonseg:val": summary(20, giou=0.5, ciou=0.25), "reasonseg:test": summary(779)}
    text = "\n".join(comparison_lines(found))
    assert "| **this evaluation** | part | part | - | - |" in text
    assert "Part: not the whole split, and so no result on it: 20 of 200 rows of reasons" in text


@pytest.mark.parametrize("num_rows", [10_834, 3_811])
def test_comparison_lines_sentences_and_references_are_whole_splits(num_rows):
    text = "\n".join(comparison_lines({"refcoco:val": summary(num_rows, ciou=0.5)}))
    assert "**50.0**" in text


def test_comparison_json_has_the_tables_of_evaluated_splits():
    assert comparison_json({"x.jsonl": summary(3)}) == []
    (table,) = comparison_json({"reasonseg:val": summary(3)})
    assert table["columns"][0] == "reasonseg:val giou"
    assert {
        "method": "CoPRS-7B",
        "values": [65.2, 64.5, 59.8, 55.1],
        "source": SOURCES["coprs"],
    } in (table["rows"])


def test_split_name_drops_the_split_by():
    assert split_name("refcocog:umd:test") == "refcocog:test"
    assert split_name("rows.parquet") == "rows.parquet"
