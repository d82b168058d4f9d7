"""The schema: what it takes, what it refuses and how it says so."""

import json

import pytest

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema


def schema(*features, **kwargs):
    return Schema(features=features, **{"labels": ("y",), **kwargs})


def test_config_round_trip_through_json():
    made = schema(
        Categorical(name="tab", vocabulary=(1, 2, 4)),
        Categorical(name="user", num_ids=5, side="user", domains=(1, 2)),
        Categorical(name="seen", num_ids=5, table="user", max_length=3, pooling="sqrtn"),
        Categorical(name="city", dtype="string", vocabulary=("a", "b"), dim=8),
        Dense(name="age", mean=1.0, variance=2.0),
        labels=("y", "z"),
        weight="w",
        task_id="user",
        domain="tab",
        label_domains={"z": (4,)},
        domain_weights=((4, 0.5), (1, 2)),
        only_domains=(4, 1),
    )
    assert Schema.from_config(json.loads(json.dumps(made.to_config()))) == made


def test_input_names_list_the_lengths_last():
    made = schema(Categorical(name="a", num_ids=2, max_length=3), Dense(name="b"))
    assert made.input_names == ("a", "b", "a_length")


def test_rows_count_the_out_of_vocabulary_row():
    assert Categorical(name="a", num_ids=7).num_rows == 8
    assert Categorical(name="a", hash_buckets=7).num_rows == 8
    assert Categorical(name="a", vocabulary=(4, 5)).num_rows == 3


TAB = Categorical(name="tab", vocabulary=(7, 1, 4))


def test_domains_have_places_from_one_on():
    made = schema(TAB, domain="tab")
    assert made.num_domains == 3
    assert made.owners((4, 7)) == (False, True, False, True)
    numbered = schema(Categorical(name="tab", num_ids=3), domain="tab")
    assert numbered.owners((0, 2)) == (False, True, False, True)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ([Dense(name="a", domains=(1,))], {}, "`a` is owned by domains: the column that `domain`"),
        (
            [Categorical(name="tab", hash_buckets=3), Dense(name="a", domains=(1,))],
            {"domain": "tab"},
            "`a` is owned by domains",
        ),
        ([TAB, Dense(name="a", domains=(5,))], {"domain": "tab"}, "domain 5 is not in `tab`"),
        (
            [Categorical(name="tab", num_ids=2, domains=(1,))],
            {"domain": "tab"},
            "`tab` tells the domain",
        ),
        ([TAB], {"domain": "tab", "label_domains": {"x": (1,)}}, "should name labels"),
        ([TAB], {"label_domains": {"y": (1,)}}, "label `y` has domains"),
        ([TAB], {"only_domains": (1,)}, "`only_domains` needs `domain`"),
        ([TAB], {"domain": "tab", "domain_weights": ((1, -1),)}, "domain 1 should be >= 0"),
    ],
)
def test_domains_that_do_not_fit_are_refused(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        schema(*features, **arguments)


def test_a_model_by_domain_needs_a_feature_that_tells_it():
    with pytest.raises(ValueError, match="among the features"):
        _ = schema(Dense(name="a"), domain="tab").num_domains


def test_completeness():
    counted = Categorical(name="a", vocabulary=(1,))
    assert schema(counted, Dense(name="b", mean=0.0, variance=1.0)).is_complete
    assert not schema(Categorical(name="a")).is_complete
    assert not schema(counted, Dense(name="b")).is_complete


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schema(Dense(name="a"), Dense(name="a")), "`a` is declared twice as a feature"),
        (lambda: schema(Dense(name="a"), labels=("y", "y")), "`y` is declared twice as a label"),
        (lambda: schema(Dense(name="y")), "`y` is a feature and `y` is a label"),
        (
            lambda: schema(Categorical(name="a", num_ids=2, max_length=3), Dense(name="a_length")),
            "`a_length` is a feature and `a_length` is the length of the list `a`",
        ),
        (lambda: schema(), "at least one feature"),
        (lambda: schema(Dense(name="a"), labels=()), "at least one label"),
        (lambda: Categorical(name="a b"), "letters, digits and underscores.*Received: 'a b'"),
        (lambda: Dense(name="class"), "no Python keyword"),
        (lambda: schema(Dense(name="a"), labels=("status",)), "nor one of .*'status'"),
        (lambda: schema(Dense(name="a"), labels="click"), "`labels` should be a list of names"),
        (lambda: Categorical(name="a", dim=0), r"feature `a`: `dim` should be >= 1. Received: 0"),
        (lambda: Categorical(name="a", side="them"), r"`side` should be one of .*Received: 'them'"),
        (lambda: Categorical(name="a", num_ids=3, hash_buckets=3), "give one encoding"),
        (lambda: Categorical(name="a", num_ids=3, dtype="string"), "`num_ids` needs dtype int64"),
        (lambda: Categorical(name="a", vocabulary=("x",)), "should hold int64. Received: 'x'"),
        (lambda: Categorical(name="a", vocabulary=(1, 1)), "holds a value twice"),
        (lambda: Dense(name="a", mean=1.0), "give `mean` and `variance`, or neither"),
        (lambda: Dense(name="a", mean=1.0, variance=0.0), "`variance` should be > 0"),
        (
            lambda: schema(
                Categorical(name="a", num_ids=2), Categorical(name="b", num_ids=3, table="a")
            ),
            "features `a` and `b` share table `a` and should agree in `num_ids`",
        ),
        (
            lambda: Schema.from_config({"features": [{"name": "a", "dims": 4}], "labels": ["y"]}),
            r"features\[0\] \(a\): unknown key `dims`; did you mean `dim`\?",
        ),
        (
            lambda: Schema.from_config({"features": [{"name": "a"}], "label": ["y"]}),
            "schema: unknown key `label`; did you mean `labels`",
        ),
        (
            lambda: Schema.from_config({"features": [{"kind": "sparse", "name": "a"}]}),
            "`kind` should be one of",
        ),
        (lambda: Schema.from_config({"features": [{"dim": 3}], "labels": ["y"]}), "missing key"),
        (lambda: Categorical(name="a").num_rows, "its vocabulary has not been counted"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LIST = Categorical(name="seen", num_ids=3, max_length=2)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ([Dense(name="age"), Dense(name="Age")], {}, "`age` is a feature and `Age` is a feature"),
        ([LIST, Dense(name="Seen_length")], {}, "`Seen_length` is a feature and `seen_length` is"),
        (
            [Dense(name="a"), Dense(name="support_a")],
            {},
            "`support_a` is a feature and",
        ),
        ([Dense(name="Y")], {}, "`Y` is a feature and `y` is a label"),
        ([Dense(name="a")], {"task_id": "A"}, "`a` is a feature and `A` is a column that"),
        ([Dense(name="a")], {"timestamp": "y"}, "`y` is a label and `y` is a column that"),
        ([TAB, Dense(name="tab_id")], {"domain": "tab"}, "`tab_id` is a feature and the input"),
        (
            [Dense(name="Event_Id")],
            {"task_id": "t", "timestamp": "at"},
            "`Event_Id` is a feature and `event_id` is the input for an event's id",
        ),
        (
            [LIST, Categorical(name="b", num_ids=3, table="Seen")],
            {},
            "tables `seen` and `Seen` differ by case alone",
        ),
    ],
)
def test_names_that_would_meet_in_a_served_graph_are_refused(features, arguments, message):
    with pytest.raises(ValueError, match=message):
        schema(*features, **arguments)


@pytest.mark.parametrize("table", ["a/b", "..", "x" * 64])
def test_a_table_that_no_file_can_be_named_by_is_refused(table):
    with pytest.raises(ValueError, match="1 to 63 letters, digits and underscores"):
        Categorical(name="a", num_ids=3, table=table)


def test_a_column_may_have_several_roles():
    made = schema(TAB, task_id="tab", domain="tab", gauc_by=("tab", "day"), timestamp="at")
    assert made.domain_feature == TAB
    schema(Dense(name="a"), task_id="scene", domain="scene")


def test_domains_may_be_strings():
    scene = Categorical(name="scene", dtype="string", vocabulary=("home", "search"))
    made = schema(scene, Dense(name="a", domains=("search",)), domain="scene")
    assert made.owners(("search",)) == (False, False, True)
    assert made.domain_dtype == "string"
    assert schema(Dense(name="a"), domain="scene", only_domains=("home",)).domain_dtype == "string"
    with pytest.raises(ValueError, match=r"domains should be string\. Received: 3"):
        schema(scene, domain="scene", only_domains=(3,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_kinds": {"x": "rating"}}, "`label_kinds` should name labels"),
        ({"label_weights": {"y": -1.0}}, "that of y should be a column or a number >= 0"),
        ({"label_moments": {"y": (0.0, 0.0)}}, "those of y should be a mean and a variance > 0"),
        ({"optional_labels": ("x",)}, "`optional_labels` should name labels"),
        ({"event_id": "e", "task_id": "t"}, "`event_id` needs `task_id` and `timestamp`"),
        ({"gauc_by": ("day",)}, "`gauc_by`: 'day' needs `timestamp`"),
        ({"task_id": "a"}, "`task_id` names the feature `a`, which should hold one int64 a row"),
        ({"task_id": "seen"}, "`task_id` names the feature `seen`"),
    ],
)
def test_roles_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        schema(Dense(name="a"), LIST, **arguments)


def test_a_rating_is_complete_with_its_moments():
    made = schema(Dense(name="a", mean=0.0, variance=1.0), label_kinds={"y": "rating"})
    assert not made.is_complete
    made = schema(*made.features, label_kinds={"y": "rating"}, label_moments={"y": (3.5, 1.2)})
    assert made.is_complete
    assert made.kind("y") == "rating"
    assert Schema.from_config(json.loads(json.dumps(made.to_config()))) == made


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"name": "a", "dim": "16"}, r"\(a\): `dim` should be int. Received: '16'"),
        ({"name": "a", "pooling": "avg"}, r"`pooling` should be one of \('mean', 'sum'"),
        ({"name": "a", "domains": [1.5]}, "`domains` should be a list of int or str"),
        ({"name": "a", "default": "x"}, "feature `a`: `default` should be int64. Received: 'x'"),
        ({"name": "a", "max_length": 2, "default": 0}, r"`default` should be \(\). Received: 0"),
        ({"name": "a", "kind": "dense", "mean": float("inf"), "variance": 1}, "should be finite"),
        ({"name": "a", "kind": "dense", "default": "0"}, "`default` should be float. Received"),
    ],
)
def test_values_of_another_type_are_refused(feature, message):
    with pytest.raises(ValueError, match=message):
        Schema.from_config({"features": [feature], "labels": ["y"]})
